// UTF-8 and the three kinds of character that GPT-2's tokenizer tells apart.
#pragma once

#include <string>
#include <string_view>

namespace mmmamba {

struct Character {
    enum Kind { whole, cut, bad } kind;
    size_t length;  // bytes; of a cut or bad one, those that could have begun a character
    char32_t code;  // of a whole one
};

// The character that `bytes` (not empty) begin with. Cut: they end before it does.
Character next_character(std::string_view bytes);

// UserError unless `text` is UTF-8; `where` says which input it was.
void check_utf8(std::string_view text, const std::string& where);

bool is_letter(char32_t code);  // \p{L}
bool is_number(char32_t code);  // \p{N}
bool is_space(char32_t code);   // \s

// Decodes piece by piece: gives whole characters only, U+FFFD for bytes that are none.
class Utf8Stream {
public:
    std::string push(std::string_view bytes);
    std::string flush();  // what is left at the end of a text

private:
    std::string rest_;  // the beginning of a character
};

}  // namespace mmmamba
