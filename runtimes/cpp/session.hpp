// A conversation: each turn reads only what is new, for the state remembers the rest.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "model.hpp"
#include "tokenizer.hpp"

namespace mmmamba {

struct Stats {                     // of the last turn, as mmmamba_edge/answer.py names them
    int64_t turn = 0;              // questions asked so far
    int64_t prompt_tokens = 0;     // read before the answer began
    int64_t generated_tokens = 0;  // said
    int64_t steps = 0;             // of those, read by the model
    int64_t context_tokens = 0;    // of the whole conversation, read so far
    double prefill_s = 0, decode_s = 0, first_token_s = 0;

    double prefill_speed() const { return prefill_s > 0 ? prompt_tokens / prefill_s : 0; }
    double speed() const { return decode_s > 0 ? steps / decode_s : 0; }  // tokens a second
};

struct Answer {
    std::vector<int64_t> ids;
    std::string reason;  // why it ended: "stop", "length" or a full "context"
    Stats stats;
};

class Session {
public:
    // UserError: the tokenizer is not this model's, or the template is unknown.
    Session(Model& model, const Tokenizer& tokenizer);

    // Reads a question with its pictures and says the likeliest answer, piece by piece; no piece
    // splits a character. UserError: nothing asked, or no room in a hybrid's attention caches.
    using Say = std::function<void(const std::string&)>;
    const Answer& ask(const std::string& question, const std::vector<Picture>& pictures,
                      int64_t max_new_tokens, const Say& say);

    // Session files, the same as Python's. UserError: another model's, damaged, not writable.
    void save(const std::string& path);
    void load(const std::string& path);

private:
    std::vector<int64_t> turn_ids(const std::string& question,
                                  const std::vector<int>& tile_counts) const;
    void answer(int64_t max_new_tokens, const Say& say);
    std::string next_token(int64_t max_new_tokens);
    int64_t likeliest();

    Model& model_;
    const Tokenizer& tokenizer_;
    const Template* template_;
    std::vector<int64_t> stop_ids_;
    Answer answer_;                   // the last one
    float* logits_ = nullptr;         // (vocab_size,) after the last token read
    std::optional<int64_t> pending_;  // a token that was said and not read yet
};

}  // namespace mmmamba
