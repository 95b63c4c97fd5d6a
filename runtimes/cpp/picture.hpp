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

// PNG, JPEG, PPM or PGM, with the pixels that mmmamba_edge/image.py gets of them.
// UserError: not readable, not a picture, damaged, or too large.
Picture load_picture(const std::string& path);

}  // namespace mmmamba
