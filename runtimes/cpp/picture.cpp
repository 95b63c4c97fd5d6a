#include "picture.hpp"

#include <memory>
#include <string_view>

#include "files.hpp"

// From anywhere may a picture come: only formats that people use are compiled in.
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#define STBI_NO_PSD
#define STBI_NO_PIC
#define STBI_NO_TGA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include <stb_image.h>
#pragma GCC diagnostic pop

namespace mmmamba {

namespace {

constexpr int64_t MOST_PIXELS = 50'000'000;  // tiles never need so many

// EXIF orientation 1 to 8 of a JPEG: how the camera was held; 1 where it does not say.
int orientation(std::string_view file) {
    const auto byte = [&](size_t at) {
        return at < file.size() ? static_cast<unsigned char>(file[at]) : 0u;
    };
    if (byte(0) != 0xFF || byte(1) != 0xD8) return 1;
    for (size_t at = 2; byte(at) == 0xFF && byte(at + 1) != 0xDA;) {  // 0xDA: the pixels begin
        const size_t length = byte(at + 2) << 8 | byte(at + 3);
        if (byte(at + 1) == 0xE1 && file.substr(at + 4, 6) == std::string_view("Exif\0\0", 6)) {
            const size_t tiff = at + 10;
            const bool little = byte(tiff) == 'I';
            const auto number = [&](size_t from, int bytes) {
                size_t value = 0;
                for (int i = 0; i < bytes; ++i) {
                    value = value << 8 | byte(tiff + from + (little ? bytes - 1 - i : i));
                }
                return value;
            };
            const size_t table = number(4, 4), entries = number(table, 2);
            for (size_t i = 0; i < entries && table + 2 + 12 * i < file.size(); ++i) {
                const size_t entry = table + 2 + 12 * i;
                const size_t value = number(entry + 8, 2);
                if (number(entry, 2) == 0x0112) return value >= 1 && value <= 8 ? value : 1;
            }
        }
        at += 2 + length;
    }
    return 1;
}

Picture upright(const Picture& from, int orientation) {
    const bool turned = orientation >= 5;  // width and height change places
    const bool mirrored_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    const bool mirrored_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    Picture to{turned ? from.height : from.width, turned ? from.width : from.height, {}};
    to.rgb.reserve(from.rgb.size());
    for (int y = 0; y < to.height; ++y) {
        for (int x = 0; x < to.width; ++x) {
            const int u = turned ? y : x, v = turned ? x : y;  // where in `from`, but for mirrors
            const int64_t column = mirrored_x ? from.width - 1 - u : u;
            const int64_t row = mirrored_y ? from.height - 1 - v : v;
            const uint8_t* pixel = &from.rgb[3 * (row * from.width + column)];
            to.rgb.insert(to.rgb.end(), pixel, pixel + 3);
        }
    }
    return to;
}

}  // namespace

Picture load_picture(const std::string& path) {
    const std::string file = read_file(path);
    const auto* bytes = reinterpret_cast<const stbi_uc*>(file.data());
    const int size = static_cast<int>(file.size());
    if (file.empty()) throw UserError(path + ": the file is empty (0 bytes); expected a picture");
    int width = 0, height = 0, channels = 0;
    if (file.size() > INT32_MAX || !stbi_info_from_memory(bytes, size, &width, &height, &channels)) {
        throw UserError(path + ": not a picture that can be read; convert it to PNG or JPEG");
    }
    if (int64_t{width} * height > MOST_PIXELS) {
        throw UserError(path + ": " + std::to_string(width) + "x" + std::to_string(height) +
                        " is more than 50 megapixels; save it smaller");
    }
    const std::unique_ptr<stbi_uc, void (*)(void*)> rgba(
        stbi_load_from_memory(bytes, size, &width, &height, &channels, 4), stbi_image_free);
    if (!rgba) {
        throw UserError(path + ": the picture is truncated or damaged (" + stbi_failure_reason() +
                        "); copy or save it again");
    }
    Picture picture{width, height, {}};
    picture.rgb.reserve(size_t{3} * width * height);
    const stbi_uc* end = rgba.get() + size_t{4} * width * height;
    for (const stbi_uc* pixel = rgba.get(); pixel != end; pixel += 4) {
        for (int c = 0; c < 3; ++c) {  // laid on white, rounded as Pillow does
            const int sum = pixel[c] * pixel[3] + 255 * (255 - pixel[3]) + 128;
            picture.rgb.push_back(static_cast<uint8_t>((sum + (sum >> 8)) >> 8));
        }
    }
    const int held = orientation(file);
    return held == 1 ? picture : upright(picture, held);
}

}  // namespace mmmamba
