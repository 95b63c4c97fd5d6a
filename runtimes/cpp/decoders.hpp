// A picture file's bytes to pixels, by libpng and libjpeg.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmmamba {

struct Decoded {
    int width = 0, height = 0;
    std::vector<uint8_t> rgba;  // (height, width, 4)
    std::string exif;           // its TIFF block; empty: none
};

// UserError: damaged, or more than 50 megapixels.
Decoded decode_png(const std::string& file);
Decoded decode_jpeg(const std::string& file);
Decoded decode_pnm(const std::string& file);  // PPM (P6) and PGM (P5) of 8 bits

}  // namespace mmmamba
