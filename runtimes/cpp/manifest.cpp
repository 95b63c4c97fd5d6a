#include "manifest.hpp"

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "files.hpp"

namespace mmmamba {

namespace {

using nlohmann::json;

constexpr int FORMAT = 1;  // other numbers are refused

// Whoever skips a key that he does not know runs a model that he does not know.
void check_keys(const json& object, const std::set<std::string>& keys, const std::string& where) {
    for (const auto& [key, value] : object.items()) {
        if (!keys.count(key)) throw UserError(where + ": unknown key " + key);
    }
    for (const std::string& key : keys) {
        if (!object.contains(key)) throw UserError(where + ": missing key " + key);
    }
}

Manifest checked(const json& data, const std::string& where) {
    if (!data.is_object() || !data.contains("format")) {
        throw UserError(where + ": no format number; this is not a bundle's manifest");
    }
    if (data["format"] != FORMAT) {
        throw UserError(where + ": bundle format " + data["format"].dump() +
                        "; this release reads " + std::to_string(FORMAT) +
                        ". Export the checkpoint again with this release, or use "
                        "the release that made the file");
    }
    check_keys(
        data,
        {"format", "producer", "model_id", "quant", "max_context", "ops", "opset", "settings",
         "graphs", "state", "template", "tokenizer", "model", "verification", "files"},
        where);
    const json& model = data["model"];
    check_keys(
        model,
        {"embedding", "llm", "vocab_size", "image_size", "patch_size", "downsample_ratio",
         "pixel_shuffle_loc", "img_context_token_id", "eos_token_id", "normalize_encoder_output",
         "template", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail"},
        where + " model");
    Manifest m;
    m.model_id = data["model_id"];
    m.quant = data["quant"];
    m.template_name = data["template"];
    if (!data["max_context"].is_null()) m.max_context = data["max_context"].get<int64_t>();
    std::set<std::string> kinds;
    for (const char* half : {"embedding", "llm"}) {
        for (const json& kind : model[half].at("layer_types")) kinds.insert(kind);
    }
    m.variant = !kinds.count("attention") ? "linear" : kinds.size() > 1 ? "hybrid" : "teacher";
    m.tokenizer_sha256 = data["settings"].value("tokenizer_sha256", m.tokenizer_sha256);
    m.vocab_size = model["vocab_size"];
    m.image_token = model["img_context_token_id"];
    const int side = model["image_size"], patch = model["patch_size"];
    const int merge = std::lround(1 / model["downsample_ratio"].get<double>());
    if (side < 1 || patch < 1 || merge < 1 || side / patch / merge < 1) {
        throw UserError(where + ": image_size " + std::to_string(side) + " holds no patch");
    }
    m.tokens_per_tile = (side / patch / merge) * (side / patch / merge);
    m.tiles = {side, model["min_dynamic_patch"], model["max_dynamic_patch"],
               model["use_thumbnail"]};
    m.state_bytes = data["state"].at("bytes");
    for (const json& tensor : data["state"].at("tensors")) {
        auto shape = tensor.at("shape").get<std::vector<int64_t>>();
        if (tensor.at("dtype") != "float32" || shape.empty()) {
            throw UserError(where + ": the state is not float32, which this program expects");
        }
        shape.erase(shape.begin());
        m.state.push_back({tensor.at("name"), shape});
    }
    return m;
}

}  // namespace

Manifest read_manifest(const std::string& text, const std::string& where) {
    try {
        return checked(json::parse(text), where);
    } catch (const json::exception& error) {
        throw UserError(where + ": damaged (" + error.what() + ")");
    }
}

}  // namespace mmmamba
