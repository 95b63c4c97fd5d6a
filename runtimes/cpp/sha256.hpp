// SHA-256 (FIPS 180-4): is this the tokenizer the model was exported with?
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace mmmamba {

class Sha256 {
public:
    void update(std::string_view bytes);
    std::string hex();  // of all that was given; ends it

private:
    void block(const uint8_t* bytes);  // 64 of them

    std::array<uint32_t, 8> hash_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> rest_{};  // bytes that do not fill a block yet
    uint64_t count_ = 0;              // bytes so far
};

inline std::string sha256(std::string_view bytes) {
    Sha256 digest;
    digest.update(bytes);
    return digest.hex();
}

}  // namespace mmmamba
