// A picture file as pixels: decoded, upright, on white.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmmamba {

struct Picture {
    int width = 0, height = 0;
    std::vector<uint8_t> rgb;  // (height, width, 3)
};

// PNG, JPEG, PPM, PGM, BMP or GIF; as mmmamba_edge/image.py decodes them, but for JPEG's last bit.
// UserError: not readable, not a picture, damaged, or too large.
Picture load_picture(const std::string& path);

}  // namespace mmmamba
