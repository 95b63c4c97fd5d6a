#include "prompt.hpp"

#include "files.hpp"

namespace mmmamba {

namespace {

const std::string PLACEHOLDER = "<image>";  // where in a question a picture belongs

// A fixed constant of the released models, part of what they were trained on.
const char* const INTERNVL_SYSTEM =
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。";

const Segment BOS = {Segment::bos, ""}, S = {Segment::special, "<s>"};
const std::string IM_START = "<|im_start|>", IM_END = "<|im_end|>";

const Template TEMPLATES[] = {
    {"internlm2-chat", IM_START, IM_END, "user\n", "assistant\n", "", BOS, INTERNVL_SYSTEM},
    {"scenes", IM_START, IM_END, "user\n", "assistant\n", "", S, ""},
    {"chatml", IM_START, IM_END, "user\n", "assistant\n", "\n", BOS, ""},
    {"plain", "", "", "", "", "\n", BOS, ""},
};

Prompt mark(const std::string& name) {
    return name.empty() ? Prompt{} : Prompt{{Segment::special, name}};
}

Prompt text(const std::string& words) {
    return words.empty() ? Prompt{} : Prompt{{Segment::text, words}};
}

}  // namespace

Prompt operator+(Prompt left, const Prompt& right) {
    for (const Segment& segment : right) {
        if (segment.kind == Segment::text && !left.empty() && left.back().kind == Segment::text) {
            left.back().words += segment.words;
        } else {
            left.push_back(segment);
        }
    }
    return left;
}

Prompt Template::opening() const {
    return system.empty() ? Prompt{first} : Prompt{first} + turn("system\n", text(system));
}

Prompt Template::user_turn(const std::string& question, const std::vector<int>& tile_counts,
                           int tokens_per_tile) const {
    size_t named = 0;
    for (size_t at = 0; (at = question.find(PLACEHOLDER, at)) != std::string::npos; ++named) {
        at += PLACEHOLDER.size();
    }
    if (named > tile_counts.size()) {
        throw UserError("prompt: " + std::to_string(named) + " <image> for " +
                        std::to_string(tile_counts.size()) + " pictures; give one picture for " +
                        "each, or leave <image> out");
    }
    std::string rest;
    for (size_t i = named; i < tile_counts.size(); ++i) rest += PLACEHOLDER + "\n";
    rest += question;

    Prompt body;
    for (const int tiles : tile_counts) {
        const size_t at = rest.find(PLACEHOLDER);
        body = body + text(rest.substr(0, at)) + mark(IMG_START);
        body.push_back({Segment::special, IMG_CONTEXT, tiles * tokens_per_tile});
        body = body + mark(IMG_END);
        rest.erase(0, at + PLACEHOLDER.size());
    }
    return turn(user_role, body + text(rest));
}

Prompt Template::assistant_prefix() const { return mark(start) + text(assistant_role); }

Prompt Template::after_answer() const { return mark(end) + text(after_end); }

Prompt Template::turn(const std::string& role, const Prompt& body) const {
    return mark(start) + text(role) + body + after_answer();
}

const Template& get_template(const std::string& name) {
    std::string known;
    for (const Template& candidate : TEMPLATES) {
        if (candidate.name == name) return candidate;
        known += (known.empty() ? "" : ", ") + candidate.name;
    }
    throw UserError("template: unknown name '" + name + "'; known are " + known);
}

}  // namespace mmmamba
