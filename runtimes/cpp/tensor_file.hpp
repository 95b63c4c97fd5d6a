// Arrays in a safetensors file with a hash: session files, as mmmamba_edge/state.py has them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mmmamba {

struct Array {
    std::string dtype;  // "F32", "F16", "I16" or "U8"
    std::vector<int64_t> shape;
    std::string bytes;  // little-endian, as every machine is that this runs on
};

struct TensorFile {
    std::map<std::string, std::string> metadata;
    std::map<std::string, Array> arrays;
};

// Writes `file` whole or not at all, readable by its owner only. UserError: it cannot be written.
void write_tensors(const std::string& path, const TensorFile& file);

// UserError: missing, not safetensors, truncated, or its contents do not match their hash.
TensorFile read_tensors(const std::string& path);

}  // namespace mmmamba
