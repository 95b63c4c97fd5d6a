#include "unicode.hpp"

#include <algorithm>
#include <cstdio>

#include "files.hpp"

namespace mmmamba {

namespace {

struct Range {
    char32_t first, last;
};

#include "unicode_ranges.inc"  // LETTERS and NUMBERS, sorted

template <size_t N>
bool in(const Range (&ranges)[N], char32_t code) {
    const Range* after = std::upper_bound(
        ranges, ranges + N, code, [](char32_t c, const Range& range) { return c < range.first; });
    return after != ranges && code <= after[-1].last;
}

const std::string REPLACEMENT = "\uFFFD";

}  // namespace

// Unicode 15, table 3-7: which second byte may follow which first.
Character next_character(std::string_view bytes) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
    const unsigned char first = byte(0);
    if (first < 0x80) return {Character::whole, 1, first};
    if (first < 0xC2 || first > 0xF4) return {Character::bad, 1, 0};
    const size_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    char32_t code = first & (0x7F >> length);
    for (size_t i = 1; i < length; ++i) {
        if (i == bytes.size()) return {Character::cut, i, 0};
        const unsigned char low = i > 1 ? 0x80 : first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
        const unsigned char high = i > 1           ? 0xBF
                                   : first == 0xED ? 0x9F
                                   : first == 0xF4 ? 0x8F
                                                   : 0xBF;
        if (byte(i) < low || byte(i) > high) return {Character::bad, i, 0};
        code = code << 6 | (byte(i) & 0x3F);
    }
    return {Character::whole, length, code};
}

void check_utf8(std::string_view text, const std::string& where) {
    for (size_t at = 0; at < text.size();) {
        const Character character = next_character(text.substr(at));
        if (character.kind != Character::whole) {
            char hex[8];
            std::snprintf(hex, sizeof hex, "0x%02x", static_cast<unsigned char>(text[at]));
            throw UserError(where + ": not UTF-8 (byte " + hex + " at " + std::to_string(at) +
                            "); save or type it as UTF-8");
        }
        at += character.length;
    }
}

bool is_letter(char32_t code) { return in(LETTERS, code); }

bool is_number(char32_t code) { return in(NUMBERS, code); }

bool is_space(char32_t code) {
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xA0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
           code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

std::string Utf8Stream::push(std::string_view bytes) {
    rest_ += bytes;
    std::string text;
    size_t at = 0;
    while (at < rest_.size()) {
        const Character character = next_character(std::string_view(rest_).substr(at));
        if (character.kind == Character::cut) break;
        text +=
            character.kind == Character::whole ? rest_.substr(at, character.length) : REPLACEMENT;
        at += character.length;
    }
    rest_.erase(0, at);
    return text;
}

std::string Utf8Stream::flush() {
    const std::string text = rest_.empty() ? "" : REPLACEMENT;
    rest_.clear();
    return text;
}

}  // namespace mmmamba
