#include "picture.hpp"

#include "decoders.hpp"
#include "files.hpp"

namespace mmmamba {

namespace {

// EXIF orientation, 1 to 8: how the camera was held; 1 where the TIFF block does not say.
int orientation(const std::string& tiff) {
    const bool little = tiff.rfind("II", 0) == 0;
    const auto number = [&](size_t at, size_t bytes) -> size_t {
        if (at + bytes > tiff.size()) return 0;
        size_t value = 0;
        for (size_t i = 0; i < bytes; ++i) {
            value =
                value << 8 | static_cast<unsigned char>(tiff[at + (little ? bytes - 1 - i : i)]);
        }
        return value;
    };
    const size_t table = number(4, 4), entries = number(table, 2);
    for (size_t i = 0; i < entries; ++i) {
        const size_t entry = table + 2 + 12 * i, value = number(entry + 8, 2);
        if (number(entry, 2) == 0x0112)
            return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
    }
    return 1;
}

Picture upright(const Picture& from, int held) {
    const bool turned = held >= 5;  // width and height change places
    const bool mirrored_x = held == 2 || held == 3 || held == 7 || held == 8;
    const bool mirrored_y = held == 3 || held == 4 || held == 6 || held == 7;
    Picture to{turned ? from.height : from.width, turned ? from.width : from.height, {}};
    to.rgb.reserve(from.rgb.size());
    for (int y = 0; y < to.height; ++y) {
        for (int x = 0; x < to.width; ++x) {
            const int u = turned ? y : x, v = turned ? x : y;  // where in `from`, but for mirrors
            const int column = mirrored_x ? from.width - 1 - u : u;
            const int row = mirrored_y ? from.height - 1 - v : v;
            const uint8_t* pixel = &from.rgb[3 * (size_t(row) * from.width + column)];
            to.rgb.insert(to.rgb.end(), pixel, pixel + 3);
        }
    }
    return to;
}

// Drawings with transparency are made to be seen on a page.
Picture on_white(const Decoded& decoded) {
    Picture picture{decoded.width, decoded.height, {}};
    picture.rgb.reserve(decoded.rgba.size() / 4 * 3);
    for (size_t at = 0; at < decoded.rgba.size(); at += 4) {
        const int alpha = decoded.rgba[at + 3];
        for (int c = 0; c < 3; ++c) {  // rounded as Pillow does
            const int sum = decoded.rgba[at + c] * alpha + 255 * (255 - alpha) + 128;
            picture.rgb.push_back(static_cast<uint8_t>((sum + (sum >> 8)) >> 8));
        }
    }
    return picture;
}

using Decoder = Decoded (*)(const std::string&);

Decoder decoder_of(const std::string& file) {
    const auto begins = [&](const char* with) { return file.rfind(with, 0) == 0; };
    if (begins("\x89PNG")) return decode_png;
    if (begins("\xFF\xD8\xFF")) return decode_jpeg;
    if (begins("P6") || begins("P5")) return decode_pnm;
    return nullptr;
}

}  // namespace

Picture load_picture(const std::string& path) {
    const std::string file = read_file(path);
    if (file.empty()) throw UserError(path + ": the file is empty (0 bytes); expected a picture");
    const Decoder decode = decoder_of(file);
    if (!decode)
        throw UserError(path + ": not a picture that can be read; convert it to PNG or JPEG");
    try {
        const Decoded decoded = decode(file);
        const int held = orientation(decoded.exif);
        const Picture picture = on_white(decoded);
        return held == 1 ? picture : upright(picture, held);
    } catch (const UserError& error) {
        throw UserError(path + ": " + error.what());
    }
}

}  // namespace mmmamba
