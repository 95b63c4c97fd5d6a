// Pixels to model inputs: resize, cut into tiles, normalise, as mmmamba_edge/image.py does.
#pragma once

#include <vector>

#include "picture.hpp"

namespace mmmamba {

struct TileRules {
    int side = 0;  // of a tile, in pixels
    int fewest = 1, most = 1;
    bool thumbnail = true;  // the whole picture as a last tile where there is more than one
};

using Tile = std::vector<float>;  // (3, side, side)

std::vector<Tile> picture_tiles(const Picture& picture, const TileRules& rules);

// Image.resize of Pillow 13 with BICUBIC, to the last bit.
Picture resize(const Picture& picture, int width, int height);

}  // namespace mmmamba
