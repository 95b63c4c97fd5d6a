// Session::save and Session::load: the state, and the little that Python's session files say beside
// it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "files.hpp"
#include "session.hpp"
#include "tensor_file.hpp"

namespace mmmamba {

namespace {

using nlohmann::json;

const char* const KIND = "mmmamba-edge session";
const char* const VERSION = "1";  // of the format that is written
const char* const REDUCED = "2";  // of a file whose state is in 16 bits; other ones are refused

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
    size_t size = sizeof(float),
           used = sizeof(float);  // bytes of a block in memory and in the file
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

float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int mantissa = bits & 1023;
    const float size = exponent ? std::ldexp(1024.f + mantissa, exponent - 25)
                                : std::ldexp(static_cast<float>(mantissa), -24);
    return bits & 0x8000 ? -size : size;
}

// An array of a file in float32, whichever way it was kept (mmmamba_edge/reduced_state.py); nothing
// where the file has not all of it.
std::optional<Array> whole(const TensorFile& file, const std::string& name) {
    const auto found = file.arrays.find(name);
    if (found == file.arrays.end()) return {};
    const Array& kept = found->second;
    if (kept.dtype == "F32") return kept;
    std::vector<float> numbers(kept.bytes.size() / 2);
    const auto* halves = reinterpret_cast<const uint16_t*>(kept.bytes.data());
    if (kept.dtype == "F16") {
        for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = from_half(halves[i]);
        return floats(kept.shape, numbers.data());
    }
    const auto scale = file.arrays.find(name + ".scale");
    if (kept.dtype != "I16" || kept.shape.empty() || scale == file.arrays.end()) return {};
    const std::vector<int64_t> rows(kept.shape.begin(), kept.shape.end() - 1);
    if (scale->second.dtype != "F32" || scale->second.shape != rows) return {};
    const auto* scales = reinterpret_cast<const float*>(scale->second.bytes.data());
    const size_t width = kept.shape.back();
    for (size_t i = 0; i < numbers.size(); ++i) {
        numbers[i] = static_cast<int16_t>(halves[i]) * scales[i / width];
    }
    return floats(kept.shape, numbers.data());
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
         {{"temperature", 0.0},
          {"top_p", 1.0},
          {"top_k", 0},
          {"repetition_penalty", 1.0},
          {"seed", 0},
          {"random",
           {{"state", "1aa1b5345996452d09585eb7a69561e3"},
            {"inc", "418ddadb3af71a82588133bc447873a9"}}}}},
        {"stats",
         {{"turn", stats.turn},
          {"prompt_tokens", stats.prompt_tokens},
          {"reused_tokens", 0},
          {"generated_tokens", stats.generated_tokens},
          {"steps", stats.steps},
          {"context_tokens", stats.context_tokens},
          {"state_bytes", manifest.state_bytes},
          {"prefill_s", stats.prefill_s},
          {"decode_s", stats.decode_s},
          {"first_token_s", stats.first_token_s}}}};
    const json record = {
        {"model_id", manifest.model_id}, {"quant", manifest.quant}, {"template", template_->name},
        {"tokens", model_.tokens()},     {"answer", answer},        {"system", nullptr}};
    file.metadata = {{"kind", KIND}, {"version", VERSION}, {"record", record.dump()}};
    write_tensors(path, file);
}

void Session::load(const std::string& path) {
    const Manifest& manifest = model_.manifest();
    TensorFile file = read_tensors(path);
    const std::string& version = file.metadata["version"];
    if (file.metadata["kind"] != KIND || (version != VERSION && version != REDUCED)) {
        throw UserError(path + ": not a session file of format " + VERSION + " or " + REDUCED +
                        ", which this program reads");
    }
    int64_t tokens = 0;
    try {
        const json record = json::parse(file.metadata["record"]);
        if (record.at("model_id") != manifest.model_id || record.at("quant") != manifest.quant) {
            throw UserError(path +
                            ": this conversation was held with another model or another "
                            "quantisation of it; open it with the one it belongs to");
        }
        template_ = &get_template(record.at("template"));
        stop_ids_ = tokenizer_.stop_ids(*template_);
        tokens = record.at("tokens");
        if (tokens < 0 || (manifest.max_context && tokens > *manifest.max_context)) {
            throw UserError(path + ": it holds " + std::to_string(tokens) +
                            " tokens, for which this model has no room");
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
        std::optional<Array> found = whole(file, "state." + tensor.name);
        if (!found || found->shape != shape) {
            throw UserError(path + ": its state." + tensor.name + " is not what this model has");
        }
        copy_rows(tensor, tokens, state[i], found->bytes, false);
    }
    model_.go_on_after(tokens);
}

}  // namespace mmmamba
