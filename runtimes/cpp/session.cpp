#include "session.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <limits>

#include "files.hpp"

namespace mmmamba {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

bool blank(const std::string& text) {  // of ASCII, what Python's strip() leaves nothing of
    return text.find_first_not_of(" \t\r\n\f\v\x1c\x1d\x1e\x1f") == text.npos;
}

}  // namespace

Session::Session(Model& model, const Tokenizer& tokenizer)
    : model_(model),
      tokenizer_(tokenizer),
      template_(&get_template(model.manifest().template_name)),
      stop_ids_(tokenizer.stop_ids(*template_)) {
    const Manifest& manifest = model.manifest();
    const std::string advice = "; use the tokenizer files that came with the model";
    if (tokenizer.vocab_size() > manifest.vocab_size) {
        throw UserError(tokenizer.path() + ": " + std::to_string(tokenizer.vocab_size()) +
                        " tokens, but the model has " + std::to_string(manifest.vocab_size) +
                        advice);
    }
    for (const Segment& segment : template_->opening() + template_->user_turn("", {1}, 1)) {
        if (segment.kind == Segment::special) tokenizer.token_id(segment.words);  // or UserError
    }
    const int64_t found = tokenizer.token_id(IMG_CONTEXT);
    if (found != manifest.image_token) {
        throw UserError(tokenizer.path() + ": " + IMG_CONTEXT + " has id " + std::to_string(found) +
                        ", but the model expects " + std::to_string(manifest.image_token) + advice);
    }
}

const Answer& Session::ask(const std::string& question, const std::vector<Picture>& pictures,
                           int64_t max_new_tokens, const Say& say) {
    const auto start = Clock::now();
    if (blank(question) && pictures.empty()) {
        throw UserError("the prompt is empty: ask something, or give a picture");
    }
    std::vector<Tile> tiles;
    std::vector<int> tile_counts;
    for (const Picture& picture : pictures) {
        std::vector<Tile> some = picture_tiles(picture, model_.manifest().tiles);
        tile_counts.push_back(static_cast<int>(some.size()));
        std::move(some.begin(), some.end(), std::back_inserter(tiles));
    }
    const std::vector<int64_t> ids = turn_ids(question, tile_counts);
    logits_ = model_.read(ids, tiles);
    pending_.reset();

    Stats stats;
    stats.turn = answer_.stats.turn + 1;
    stats.prompt_tokens = static_cast<int64_t>(ids.size());
    stats.prefill_s = seconds_since(start);
    answer_ = {{}, "", stats};
    answer(max_new_tokens, say);
    return answer_;
}

// What is new: the token that was said last and not read, the end of the answer, the question.
std::vector<int64_t> Session::turn_ids(const std::string& question,
                                       const std::vector<int>& tile_counts) const {
    const Manifest& manifest = model_.manifest();
    const bool first = answer_.stats.turn == 0;
    const Prompt prompt = (first ? template_->opening() : template_->after_answer()) +
                          template_->user_turn(question, tile_counts, manifest.tokens_per_tile) +
                          template_->assistant_prefix();
    std::vector<int64_t> ids = tokenizer_.encode(prompt);
    if (pending_) ids.insert(ids.begin(), *pending_);
    const int64_t needed = model_.tokens() + static_cast<int64_t>(ids.size());
    if (manifest.max_context && needed > *manifest.max_context) {
        throw UserError(std::to_string(needed) + " tokens exceed the context of " +
                        std::to_string(*manifest.max_context) +
                        " that this model's attention cache was made for; begin anew, or export it "
                        "with a larger --max-context");
    }
    return ids;
}

void Session::answer(int64_t max_new_tokens, const Say& say) {
    TextStream text(tokenizer_);
    while (answer_.reason.empty()) {
        const auto start = Clock::now();
        const bool first = answer_.ids.empty();
        answer_.reason = next_token(max_new_tokens);
        const double seconds = seconds_since(start);
        if (first) answer_.stats.first_token_s = answer_.stats.prefill_s + seconds;
        answer_.stats.decode_s += seconds;
        if (answer_.reason.empty()) {
            const std::string piece = text.push(*pending_);
            if (!piece.empty()) say(piece);
        }
    }
    // Half a character at a limit may still be completed by a later token; at a stop it is over.
    const std::string tail = answer_.reason == "stop" ? text.flush() : "";
    if (!tail.empty()) say(tail);
    answer_.stats.generated_tokens = static_cast<int64_t>(answer_.ids.size());
    answer_.stats.context_tokens = model_.tokens();
}

// One more token, said before it is read, for an answer may end here; or why there is none.
std::string Session::next_token(int64_t max_new_tokens) {
    const auto limit = model_.manifest().max_context;
    if (static_cast<int64_t>(answer_.ids.size()) == max_new_tokens) return "length";
    if (pending_ && limit && model_.tokens() >= *limit) return "context";
    if (pending_) {
        logits_ = model_.read({*pending_});
        pending_.reset();
        ++answer_.stats.steps;
    }
    const int64_t token = likeliest();
    if (std::count(stop_ids_.begin(), stop_ids_.end(), token)) return "stop";
    pending_ = token;
    answer_.ids.push_back(token);
    return "";
}

int64_t Session::likeliest() {
    const Manifest& manifest = model_.manifest();
    // An image token stands for a picture's vector: said, it could never be read.
    logits_[manifest.image_token] = -std::numeric_limits<float>::infinity();
    int64_t best = 0;
    for (int64_t id = 0; id < manifest.vocab_size; ++id) {
        if (logits_[id] > logits_[best] || std::isnan(logits_[id])) best = id;
    }
    if (!std::isfinite(logits_[best])) {
        throw UserError(
            "the model's logits are not finite: its weights are damaged or its precision "
            "is too low; compare it with its checkpoint (mmmamba-edge check)");
    }
    return best;
}

}  // namespace mmmamba
