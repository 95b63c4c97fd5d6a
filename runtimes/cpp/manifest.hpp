// What a .pte says of itself (FORMAT.md), as far as this program needs it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tiles.hpp"

namespace mmmamba {

struct Manifest {
    std::string model_id, quant, template_name, variant;
    std::map<std::string, std::string> tokenizer_sha256;  // file name -> hash
    std::optional<int64_t> max_context;                   // none: no attention layer, no limit
    int64_t vocab_size = 0, image_token = 0, state_bytes = 0;
    int tokens_per_tile = 0;
    TileRules tiles;
    struct Tensor {
        std::string name;            // "{layer}.conv", ".ssm", ".key" or ".value"
        std::vector<int64_t> shape;  // without the batch axis
    };
    std::vector<Tensor> state;
};

// From JSON; `where` names it in a UserError: of another format, or with a key that is not known.
Manifest read_manifest(const std::string& text, const std::string& where);

}  // namespace mmmamba
