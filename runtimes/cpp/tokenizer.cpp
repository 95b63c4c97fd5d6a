#include "tokenizer.hpp"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "files.hpp"

namespace mmmamba {

namespace {

using nlohmann::json;

// Byte-level vocabularies write printable bytes as themselves, the others from U+0100 on.
const std::unordered_map<char32_t, char>& bytes_of_letters() {
    static const auto map = [] {
        std::unordered_map<char32_t, char> bytes;
        char32_t next = 0x100;
        for (char32_t byte = 0; byte < 256; ++byte) {
            const bool printable = (byte >= 0x21 && byte < 0x7F) || (byte >= 0xA1 && byte != 0xAD);
            bytes[printable ? byte : next++] = static_cast<char>(byte);
        }
        return bytes;
    }();
    return map;
}

// The bytes a piece of the vocabulary stands for; none where it is not written in that alphabet.
std::optional<std::string> piece_bytes(const std::string& piece) {
    std::string bytes;
    for (size_t at = 0; at < piece.size();) {
        const Character letter = next_character(std::string_view(piece).substr(at));
        const auto found = bytes_of_letters().find(letter.code);
        if (found == bytes_of_letters().end()) return std::nullopt;
        bytes += found->second;
        at += letter.length;
    }
    return bytes;
}

bool all_space(const std::string& text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return is_space(c); });
}

uint64_t pair(int64_t left, int64_t right) {
    return static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right);
}

// How long the word at `at` is, in characters. By hand what GPT-2's regular expression says:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t word_length(const std::u32string& text, size_t at) {
    for (const char32_t* ending : {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"}) {
        const std::u32string_view view(ending);
        if (text.compare(at, view.size(), view) == 0) return view.size();
    }
    const auto kind = [&](size_t i) {
        return is_letter(text[i]) ? 'L' : is_number(text[i]) ? 'N' : is_space(text[i]) ? ' ' : 'x';
    };
    size_t end = at;
    if (text[at] == U' ' && at + 1 < text.size() && kind(at + 1) != ' ') ++end;
    const char first = kind(end);
    while (end < text.size() && kind(end) == first) ++end;
    // Of several spaces before a word, the last is left to it.
    if (first == ' ' && end < text.size() && end - at > 1) --end;
    return end - at;
}

const json& member(const json& object, const char* name) {
    static const json null;
    const auto found = object.find(name);
    return found == object.end() ? null : *found;
}

std::string kind_of(const json& rule) {
    return rule.is_null() ? "none" : rule.at("type").get<std::string>();
}

// Whether the file's own rules put the token `name` before every text.
bool begins_with(const json& processor, const std::string& name) {
    const std::string kind = kind_of(processor);
    if (kind == "none" || kind == "ByteLevel") return false;
    if (kind == "Sequence") {
        const json& parts = processor.at("processors");
        return std::any_of(parts.begin(), parts.end(),
                           [&](const json& part) { return begins_with(part, name); });
    }
    if (kind != "TemplateProcessing")
        throw UserError("post_processor " + kind + " is not supported");
    const json& single = processor.at("single");
    if (single.empty() || !single[0].contains("SpecialToken")) return false;
    return single[0]["SpecialToken"].at("id") == name;
}

const std::string ONLY = "; this program reads byte-level BPE only: run the model with Python";

void expect_kind(const json& data, const char* part, const std::string& expected) {
    const std::string found = kind_of(member(data, part));
    if (found != expected) throw UserError(part + (" " + found) + ONLY);
}

}  // namespace

Tokenizer::Tokenizer(const std::string& path) : path_(path) {
    const std::string text = read_file(path);
    try {
        read(json::parse(text));
    } catch (const UserError& error) {
        throw UserError(path + ": " + error.what());
    } catch (const json::exception& error) {
        throw UserError(path + ": damaged (" + error.what() + "); fetch it again");
    }
}

void Tokenizer::read(const json& data) {
    expect_kind(data, "model", "BPE");
    expect_kind(data, "normalizer", "none");
    expect_kind(data, "pre_tokenizer", "ByteLevel");
    expect_kind(data, "decoder", "ByteLevel");
    split_ = data["pre_tokenizer"].value("use_regex", true);
    prefix_space_ = data["pre_tokenizer"].value("add_prefix_space", true);
    read_vocabulary(data["model"]);
    for (const json& token : member(data, "added_tokens")) {
        const auto id = token.at("id").get<int64_t>();
        const auto name = token.at("content").get<std::string>();
        if (all_space(name)) throw UserError("spaces are added as a token" + ONLY);
        added_[id] = {name, token.at("special").get<bool>()};
        id_of_[name] = id;
        vocab_size_ = std::max(vocab_size_, id + 1);
    }
    read_ends(data);
}

void Tokenizer::read_vocabulary(const json& model) {
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        const json& value = member(model, affix);
        if (!value.is_null() && value != "") throw UserError(affix + ONLY);
    }
    ignore_merges_ = model.value("ignore_merges", false);
    const auto ids = model.at("vocab").get<std::unordered_map<std::string, int64_t>>();
    for (const auto& [piece, id] : ids) {
        const std::optional<std::string> bytes = piece_bytes(piece);
        if (bytes) id_of_bytes_[*bytes] = id;
        bytes_of_[id] = bytes.value_or(piece);
        vocab_size_ = std::max(vocab_size_, id + 1);
    }
    for (const auto& [letter, byte] : bytes_of_letters()) {
        if (!id_of_bytes_.count({byte})) throw UserError("the vocabulary lacks some bytes" + ONLY);
    }
    const auto piece_id = [&](const std::string& piece) {
        const auto found = ids.find(piece);
        if (found == ids.end()) throw UserError("damaged: merges make '" + piece + "', no token");
        return found->second;
    };
    size_t rank = 0;
    for (const json& merge : model.at("merges")) {
        std::string left, right;
        if (merge.is_string()) {  // "left right", as older files have it
            const auto both = merge.get<std::string>();
            const size_t space = std::min(both.find(' '), both.size() - 1);
            left = both.substr(0, space), right = both.substr(space + 1);
        } else {
            left = merge.at(0).get<std::string>(), right = merge.at(1).get<std::string>();
        }
        merges_[pair(piece_id(left), piece_id(right))] = {rank++, piece_id(left + right)};
    }
    if (const json& name = member(model, "unk_token"); name.is_string()) {
        const auto found = ids.find(name.get<std::string>());
        if (found != ids.end()) unknown_id_ = found->second;
    }
}

void Tokenizer::read_ends(const json& data) {
    std::string bos = "<s>", eos = "</s>";
    json add_bos;  // null: not said
    for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
        const auto file = std::filesystem::path(path_).parent_path() / name;
        if (!std::filesystem::exists(file)) continue;
        const json small = json::parse(read_file(file.string()));
        for (auto& [key, token] : {std::pair{"bos_token", &bos}, std::pair{"eos_token", &eos}}) {
            if (!small.contains(key)) continue;
            const json& value = small[key].is_object() ? small[key].at("content") : small[key];
            *token = value.is_null() ? "" : value.get<std::string>();
        }
        if (small.contains("add_bos_token")) add_bos = small["add_bos_token"];
    }
    if (has_token(eos)) eos_id_ = token_id(eos);
    const bool wanted =
        add_bos.is_null() ? begins_with(member(data, "post_processor"), bos) : add_bos.get<bool>();
    if (wanted && has_token(bos)) bos_id_ = token_id(bos);
}

int64_t Tokenizer::token_id(const std::string& name) const {
    const auto found = id_of_.find(name);
    if (found != id_of_.end()) return found->second;
    throw UserError(path_ + ": has no token '" + name +
                    "'; use the files that came with the model");
}

std::vector<int64_t> Tokenizer::stop_ids(const Template& style) const {
    std::vector<int64_t> ids;
    if (eos_id_ >= 0) ids.push_back(eos_id_);
    for (const std::string& name : {style.start, style.end}) {
        if (has_token(name)) ids.push_back(token_id(name));
    }
    return ids;
}

std::vector<int64_t> Tokenizer::encode(const Prompt& prompt) const {
    std::vector<int64_t> ids;
    for (const Segment& segment : prompt) {
        switch (segment.kind) {
            case Segment::bos:
                if (bos_id_ >= 0) ids.push_back(bos_id_);
                break;
            case Segment::special:
                ids.insert(ids.end(), segment.count, token_id(segment.words));
                break;
            case Segment::text:
                encode_text(segment.words, ids);
                break;
        }
    }
    return ids;
}

void Tokenizer::encode_text(const std::string& text, std::vector<int64_t>& ids) const {
    check_utf8(text, "prompt");
    if (text.empty()) return;
    const std::string bytes = (prefix_space_ && text[0] != ' ' ? " " : "") + text;
    const size_t before = ids.size();
    if (split_) {
        std::u32string characters;
        std::vector<size_t> begins;  // where in the bytes each character does, and the end
        for (size_t at = 0; at < bytes.size();) {
            const Character character = next_character(std::string_view(bytes).substr(at));
            characters += character.code;
            begins.push_back(at);
            at += character.length;
        }
        begins.push_back(bytes.size());
        for (size_t at = 0, end; at < characters.size(); at = end) {
            end = at + word_length(characters, at);
            encode_word(bytes.substr(begins[at], begins[end] - begins[at]), ids);
        }
    } else {
        encode_word(bytes, ids);
    }
    // Some vocabularies hold the names of added tokens as ordinary entries.
    for (size_t i = before; i < ids.size(); ++i) {
        const auto found = added_.find(ids[i]);
        if (found != added_.end() && ids[i] != unknown_id_) {
            throw UserError("prompt: '" + found->second.name +
                            "' in the text cannot be told from "
                            "the model's own mark of that name; write it differently");
        }
    }
}

// Bytes, then the best merge again and again; words are short, so nothing cleverer is needed.
void Tokenizer::encode_word(const std::string& word, std::vector<int64_t>& ids) const {
    if (ignore_merges_) {
        const auto whole = id_of_bytes_.find(word);
        if (whole != id_of_bytes_.end()) return ids.push_back(whole->second);
    }
    std::vector<int64_t> parts;
    for (const char byte : word) parts.push_back(id_of_bytes_.at({byte}));
    for (;;) {
        const Merge* best = nullptr;
        size_t at = 0;
        for (size_t i = 0; i + 1 < parts.size(); ++i) {
            const auto found = merges_.find(pair(parts[i], parts[i + 1]));
            if (found != merges_.end() && (!best || found->second.rank < best->rank)) {
                best = &found->second;
                at = i;
            }
        }
        if (!best) break;
        parts[at] = best->id;
        parts.erase(parts.begin() + at + 1);
    }
    ids.insert(ids.end(), parts.begin(), parts.end());
}

std::string TextStream::push(int64_t id) {
    const auto added = tokenizer_.added_.find(id);
    if (added != tokenizer_.added_.end()) {
        return flush() + (added->second.special ? "" : added->second.name);
    }
    const auto found = tokenizer_.bytes_of_.find(id);
    return found == tokenizer_.bytes_of_.end() ? "" : utf8_.push(found->second);
}

}  // namespace mmmamba
