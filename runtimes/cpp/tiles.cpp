#include "tiles.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace mmmamba {

namespace {

// (columns, rows) whose ratio is closest to width / height. Of grids that are exactly equally close
// the larger is taken if the picture has more than half of its pixels.
std::pair<int, int> choose_grid(double width, double height, const TileRules& rules) {
    std::vector<std::pair<int, int>> grids;
    for (int columns = 1; columns <= rules.most; ++columns) {
        for (int rows = 1; columns * rows <= rules.most; ++rows) {
            if (columns * rows >= rules.fewest) grids.emplace_back(columns, rows);
        }
    }
    std::sort(grids.begin(), grids.end(), [](auto a, auto b) {
        return std::pair(a.first * a.second, a.first) < std::pair(b.first * b.second, b.first);
    });
    std::pair<int, int> best = grids.front();
    double best_distance = std::numeric_limits<double>::infinity();
    for (const auto& [columns, rows] : grids) {
        const double distance = std::abs(width / height - double(columns) / rows);
        const bool enough_pixels = width * height > 0.5 * rules.side * rules.side * columns * rows;
        if (distance < best_distance || (distance == best_distance && enough_pixels)) {
            best = {columns, rows};
            best_distance = distance;
        }
    }
    return best;
}

// --- resizing: libImaging/Resample.c of Pillow, for 8 bits --------------------------------------

constexpr int PRECISION = 32 - 8 - 2;  // bits of a weight behind the point

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

struct Window {  // the inputs of one output pixel
    int first;
    std::vector<int> weights;
};

std::vector<Window> windows(int in, int out) {
    const double scale = double(in) / out, stretch = std::max(scale, 1.0), support = 2 * stretch;
    std::vector<Window> all;
    for (int i = 0; i < out; ++i) {
        const double centre = (i + 0.5) * scale;
        const int first = std::max(int(centre - support + 0.5), 0);
        const int last = std::min(int(centre + support + 0.5), in);
        std::vector<double> weights;
        double sum = 0;
        for (int x = first; x < last; ++x) {
            weights.push_back(bicubic((x - centre + 0.5) * (1 / stretch)));
            sum += weights.back();
        }
        Window window{first, {}};
        for (double weight : weights) {
            if (sum != 0) weight /= sum;
            window.weights.push_back(int((weight < 0 ? -0.5 : 0.5) + weight * (1 << PRECISION)));
        }
        all.push_back(std::move(window));
    }
    return all;
}

uint8_t rounded(int sum) { return static_cast<uint8_t>(std::clamp(sum >> PRECISION, 0, 255)); }

// One direction: `step` is between neighbours of a window, in bytes.
void filter(const uint8_t* from, size_t step, const Window& window, uint8_t* to) {
    for (int c = 0; c < 3; ++c) {
        int sum = 1 << (PRECISION - 1);
        const uint8_t* in = from + window.first * step + c;
        for (const int weight : window.weights) {
            sum += *in * weight;
            in += step;
        }
        to[c] = rounded(sum);
    }
}

Picture resize_width(const Picture& from, int width) {
    Picture to{width, from.height, std::vector<uint8_t>(size_t{3} * width * from.height)};
    const std::vector<Window> all = windows(from.width, width);
    for (int y = 0; y < to.height; ++y) {
        const uint8_t* row = &from.rgb[size_t{3} * y * from.width];
        for (int x = 0; x < width; ++x)
            filter(row, 3, all[x], &to.rgb[3 * (size_t(y) * width + x)]);
    }
    return to;
}

Picture resize_height(const Picture& from, int height) {
    Picture to{from.width, height, std::vector<uint8_t>(size_t{3} * from.width * height)};
    const std::vector<Window> all = windows(from.height, height);
    const size_t stride = size_t{3} * from.width;
    for (int y = 0; y < height; ++y) {
        for (size_t x = 0; x < stride; x += 3) {
            filter(&from.rgb[x], stride, all[y], &to.rgb[y * stride + x]);
        }
    }
    return to;
}

// --- normalising --------------------------------------------------------------------------------

// ImageNet's mean and standard deviation, as every model of the family was trained.
constexpr float MEAN[3] = {0.485f, 0.456f, 0.406f}, DEVIATION[3] = {0.229f, 0.224f, 0.225f};

// The tile of a picture whose left upper corner is (left, top).
Tile normalised(const Picture& picture, int left, int top, int side) {
    Tile tile;
    tile.reserve(size_t{3} * side * side);
    for (int c = 0; c < 3; ++c) {
        for (int y = top; y < top + side; ++y) {
            for (int x = left; x < left + side; ++x) {
                const float level = picture.rgb[3 * (size_t(y) * picture.width + x) + c] / 255.0f;
                tile.push_back((level - MEAN[c]) / DEVIATION[c]);
            }
        }
    }
    return tile;
}

}  // namespace

Picture resize(const Picture& picture, int width, int height) {
    // From Pillow 13 on: what is shrunk more than twice as far in height, in height first. Between
    // the two, values are rounded to 8 bits, so the order shows.
    const int less_height = picture.height - height, less_width = picture.width - width;
    if (less_height > 0 && less_height > 2 * less_width) {
        const Picture low = resize_height(picture, height);
        return low.width == width ? low : resize_width(low, width);
    }
    const Picture narrow = picture.width == width ? picture : resize_width(picture, width);
    return narrow.height == height ? narrow : resize_height(narrow, height);
}

std::vector<Tile> picture_tiles(const Picture& picture, const TileRules& rules) {
    const int side = rules.side;
    const auto [columns, rows] = choose_grid(picture.width, picture.height, rules);
    const Picture resized = resize(picture, columns * side, rows * side);
    std::vector<Tile> tiles;
    for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < columns; ++column) {
            tiles.push_back(normalised(resized, column * side, row * side, side));
        }
    }
    if (rules.thumbnail && tiles.size() > 1) {
        tiles.push_back(normalised(resize(picture, side, side), 0, 0, side));
    }
    return tiles;
}

}  // namespace mmmamba
