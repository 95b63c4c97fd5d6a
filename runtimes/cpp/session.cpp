#include "session.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "files.hpp"
#include "tensor_file.hpp"

namespace mmmamba {

namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::json;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

bool blank(const std::string& text) { return text.find_first_not_of(" \t\r\n\f\v") == text.npos; }

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
                        " tokens, but the model has " + std::to_string(manifest.vocab_size) + advice);
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
                           int64_t max_new_tokens,
                           const std::function<void(const std::string&)>& say) {
    const auto start = Clock::now();
    const Manifest& manifest = model_.manifest();
    if (blank(question) && pictures.empty()) {
        throw UserError("the prompt is empty: ask something, or give a picture");
    }
    std::vector<Tile> tiles;
    std::vector<int> tile_counts;
    for (const Picture& picture : pictures) {
        for (Tile& tile : picture_tiles(picture, manifest.tiles)) tiles.push_back(std::move(tile));
        tile_counts.push_back(static_cast<int>(tiles.size()));
    }
    for (size_t i = tile_counts.size(); i-- > 1;) tile_counts[i] -= tile_counts[i - 1];

    const bool first = answer_.stats.turn == 0;
    std::vector<int64_t> ids;
    if (pending_) ids.push_back(*pending_);
    const auto said = tokenizer_.encode((first ? template_->opening() : template_->after_answer()) +
                                        template_->user_turn(question, tile_counts,
                                                             manifest.tokens_per_tile) +
                                        template_->assistant_prefix());
    ids.insert(ids.end(), said.begin(), said.end());
    const int64_t needed = model_.tokens() + static_cast<int64_t>(ids.size());
    if (manifest.max_context && needed > *manifest.max_context) {
        throw UserError(std::to_string(needed) + " tokens exceed the context of " +
                        std::to_string(*manifest.max_context) + " that this model's attention cache "
                        "was made for; begin anew, or export it with a larger --max-context");
    }

    logits_ = model_.read(ids, tiles);
    pending_.reset();
    Stats stats;
    stats.turn = answer_.stats.turn + 1;
    stats.prompt_tokens = static_cast<int64_t>(ids.size());
    stats.prefill_s = seconds_since(start);
    answer_ = {{}, "", stats};

    TextStream text(tokenizer_);
    while (answer_.reason.empty()) {
        const auto begun = Clock::now();
        const auto given = static_cast<int64_t>(answer_.ids.size());
        if (given == max_new_tokens) {
            answer_.reason = "length";
        } else if (pending_ && manifest.max_context && model_.tokens() >= *manifest.max_context) {
            answer_.reason = "context";
        } else {
            if (pending_) step(*pending_);
            const int64_t token = likeliest();
            if (std::count(stop_ids_.begin(), stop_ids_.end(), token)) {
                answer_.reason = "stop";
            } else {
                pending_ = token;  // said before it is read: an answer may end here
                answer_.ids.push_back(token);
            }
        }
        const double seconds = seconds_since(begun);
        if (given == 0) answer_.stats.first_token_s = answer_.stats.prefill_s + seconds;
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
    return answer_;
}

void Session::step(int64_t id) {
    logits_ = model_.read({id});
    pending_.reset();
    ++answer_.stats.steps;
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
        throw UserError("the model's logits are not finite: its weights are damaged or its precision "
                        "is too low; compare it with its checkpoint (mmmamba-edge check)");
    }
    return best;
}

// --- session files --------------------------------------------------------------------------------

namespace {

const char* const KIND = "mmmamba-edge session";
const char* const VERSION = "1";  // of the format; another one is refused

// Keys and values have a row for each token read; the file holds no rows beyond.
bool is_cache(const std::string& name) {
    const std::string kind = name.substr(name.find('.') + 1);
    return kind == "key" || kind == "value";
}

// Copies a state's rows of `tokens` tokens between the model's memory and a file's.
void copy_rows(const Manifest::Tensor& tensor, int64_t tokens, float* memory, std::string& file,
               bool to_file) {
    const auto& shape = tensor.shape;
    const bool cache = is_cache(tensor.name);
    const size_t blocks = cache ? shape[0] : 1;
    size_t size = sizeof(float), used = sizeof(float);  // bytes of a block in memory and in the file
    for (size_t i = cache ? 1 : 0; i < shape.size(); ++i) size *= shape[i], used *= shape[i];
    if (cache) used = used / shape[1] * tokens;
    if (to_file) file.resize(blocks * used);
    for (size_t block = 0; block < blocks; ++block) {
        char* here = reinterpret_cast<char*>(memory) + block * size;
        char* there = file.data() + block * used;
        std::memcpy(to_file ? there : here, to_file ? here : there, used);
    }
}

Array floats(std::vector<int64_t> shape, const float* data) {
    size_t bytes = sizeof(float);
    for (const int64_t size : shape) bytes *= size;
    return {"F32", std::move(shape), {reinterpret_cast<const char*>(data), bytes}};
}

}  // namespace

void Session::save(const std::string& path) {
    const Manifest& manifest = model_.manifest();
    TensorFile file;
    const std::vector<float*> state = model_.state();
    for (size_t i = 0; i < state.size(); ++i) {
        const Manifest::Tensor& tensor = manifest.state[i];
        Array array{"F32", tensor.shape, ""};
        if (is_cache(tensor.name)) array.shape[1] = model_.tokens();
        copy_rows(tensor, model_.tokens(), state[i], array.bytes, true);
        file.arrays["state." + tensor.name] = std::move(array);
    }
    if (!pending_) file.arrays["logits"] = floats({manifest.vocab_size}, logits_);

    const Stats& stats = answer_.stats;
    const auto& ids = answer_.ids;
    const json answer = {
        {"pending", pending_ ? json(*pending_) : json()},
        {"left", 0},
        {"given", stats.generated_tokens},
        {"steps", stats.steps},
        {"reason", answer_.reason},
        // Enough to hold every token of one character, which is what going on needs.
        {"recent", std::vector<int64_t>(ids.end() - std::min<size_t>(ids.size(), 8), ids.end())},
        // Greedy; NumPy's PCG64 as it begins with seed 0, for a Python that draws later.
        {"sampler",
         {{"temperature", 0.0}, {"top_p", 1.0}, {"top_k", 0}, {"repetition_penalty", 1.0}, {"seed", 0},
          {"random", {{"state", "1aa1b5345996452d09585eb7a69561e3"},
                      {"inc", "418ddadb3af71a82588133bc447873a9"}}}}},
        {"stats",
         {{"turn", stats.turn}, {"prompt_tokens", stats.prompt_tokens}, {"reused_tokens", 0},
          {"generated_tokens", stats.generated_tokens}, {"steps", stats.steps},
          {"context_tokens", stats.context_tokens}, {"state_bytes", manifest.state_bytes},
          {"prefill_s", stats.prefill_s}, {"decode_s", stats.decode_s},
          {"first_token_s", stats.first_token_s}}}};
    const json record = {{"model_id", manifest.model_id}, {"quant", manifest.quant},
                         {"template", template_->name}, {"tokens", model_.tokens()},
                         {"answer", answer}, {"system", nullptr}};
    file.metadata = {{"kind", KIND}, {"version", VERSION}, {"record", record.dump()}};
    write_tensors(path, file);
}

void Session::load(const std::string& path) {
    const Manifest& manifest = model_.manifest();
    TensorFile file = read_tensors(path);
    if (file.metadata["kind"] != KIND || file.metadata["version"] != VERSION) {
        throw UserError(path + ": not a session file of format " + VERSION + ", which this program reads");
    }
    int64_t tokens = 0;
    try {
        const json record = json::parse(file.metadata["record"]);
        if (record.at("model_id") != manifest.model_id || record.at("quant") != manifest.quant) {
            throw UserError(path + ": this conversation was held with another model or another "
                            "quantisation of it; open it with the one it belongs to");
        }
        template_ = &get_template(record.at("template"));
        stop_ids_ = tokenizer_.stop_ids(*template_);
        tokens = record.at("tokens");
        if (tokens < 0 || (manifest.max_context && tokens > *manifest.max_context)) {
            throw UserError(path + ": it holds " + std::to_string(tokens) + " tokens, for which this "
                            "model has no room");
        }
        if (const json& answer = record.at("answer"); !answer.is_null()) {
            answer_.stats.turn = answer.at("stats").at("turn");
            if (!answer.at("pending").is_null()) pending_ = answer.at("pending").get<int64_t>();
        }
    } catch (const json::exception& error) {
        throw UserError(path + ": a damaged session file (" + error.what() + ")");
    }
    const std::vector<float*> state = model_.state();
    for (size_t i = 0; i < state.size(); ++i) {
        const Manifest::Tensor& tensor = manifest.state[i];
        auto shape = tensor.shape;
        if (is_cache(tensor.name)) shape[1] = tokens;
        const auto found = file.arrays.find("state." + tensor.name);
        if (found == file.arrays.end() || found->second.dtype != "F32" || found->second.shape != shape) {
            throw UserError(path + ": its state." + tensor.name + " is not what this model has");
        }
        copy_rows(tensor, tokens, state[i], found->second.bytes, false);
    }
    model_.go_on_after(tokens);
}

}  // namespace mmmamba
