// What a conversation looks like to the model, as mmmamba_edge/prompt.py says it.
//
// A prompt is segments, not a string: marks that steer the model are looked up by name, and words
// that people wrote are never searched for marks.
#pragma once

#include <string>
#include <vector>

namespace mmmamba {

struct Segment {
    enum Kind { bos, special, text } kind;
    std::string words;  // the token's name, or plain words
    int count = 1;      // of a special token
};

using Prompt = std::vector<Segment>;

Prompt operator+(Prompt left, const Prompt& right);  // texts that meet become one

struct Template {
    std::string name, start, end;  // marks of a turn; empty: none
    std::string user_role, assistant_role;
    std::string after_end;  // plain words between one turn and the next
    Segment first;          // what every conversation begins with
    std::string system;     // the system message; empty: no such turn

    Prompt opening() const;
    // A question; each "<image>" in it is one picture, pictures without one come first.
    Prompt user_turn(const std::string& question, const std::vector<int>& tile_counts,
                     int tokens_per_tile) const;
    Prompt assistant_prefix() const;  // between a question and its answer
    Prompt after_answer() const;      // after a complete answer, before the next question

private:
    Prompt turn(const std::string& role, const Prompt& body) const;
};

// The template of that name; UserError lists the known ones.
const Template& get_template(const std::string& name);

inline const std::string IMG_START = "<img>", IMG_CONTEXT = "<IMG_CONTEXT>", IMG_END = "</img>";

}  // namespace mmmamba
