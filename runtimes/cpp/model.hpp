// A .pte of this project on ExecuTorch: three methods, a state in the decoder's own buffers.
#pragma once

#include <executorch/extension/module/module.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "tiles.hpp"

namespace mmmamba {

class Model {
public:
    // UserError: no .pte of this project, or a damaged one. `threads` 0: ExecuTorch's choice.
    Model(const std::string& path, int threads);

    const Manifest& manifest() const { return manifest_; }
    int64_t tokens() const { return tokens_; }  // read so far

    // Reads ids behind what was read before; the tiles' vectors go where the image tokens are.
    // Returns the logits (vocab_size,) after the last of them, valid until the next call.
    float* read(const std::vector<int64_t>& ids, const std::vector<Tile>& tiles = {});

    // The state's own memory, in the order of `manifest().state`, to be read or written.
    std::vector<float*> state();
    // Says that `state` was written with what `tokens` tokens left.
    void go_on_after(int64_t tokens) { tokens_ = tokens; }

private:
    std::vector<float> image_vectors(const std::vector<Tile>& tiles);
    executorch::aten::Tensor run(const char* method,
                                 const std::vector<executorch::runtime::EValue>& inputs);

    std::string path_;
    std::unique_ptr<executorch::extension::Module> module_;
    Manifest manifest_;
    int64_t tokens_ = 0, chunk_ = 0;  // chunk: tokens that the decoder reads at once, at most
};

}  // namespace mmmamba
