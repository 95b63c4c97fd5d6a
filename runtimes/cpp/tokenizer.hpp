// Words to token ids and back: the byte-level BPE of a tokenizer.json.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "prompt.hpp"
#include "unicode.hpp"

namespace mmmamba {

class Tokenizer {
public:
    // Reads a tokenizer.json, and which tokens begin and end a text from the small files beside it.
    // UserError: damaged, or of another kind than byte-level BPE.
    explicit Tokenizer(const std::string& path);

    std::vector<int64_t> encode(const Prompt& prompt) const;
    bool has_token(const std::string& name) const { return id_of_.count(name) > 0; }
    int64_t token_id(const std::string& name) const;  // of an added token; UserError: none
    // The tokens at which an answer is over: the turn marks and the tokenizer's own.
    std::vector<int64_t> stop_ids(const Template& style) const;
    int64_t vocab_size() const { return vocab_size_; }  // the highest id, plus one
    const std::string& path() const { return path_; }

private:
    friend class TextStream;
    struct Added {
        std::string name;
        bool special;  // left out of decoded text
    };

    void encode_text(const std::string& text, std::vector<int64_t>& ids) const;
    void encode_word(const std::string& word, std::vector<int64_t>& ids) const;
    void read(const nlohmann::json& data);
    void read_vocabulary(const nlohmann::json& model);
    void read_ends(const nlohmann::json& data);

    std::string path_;
    std::unordered_map<int64_t, std::string> bytes_of_;     // what a token stands for
    std::unordered_map<std::string, int64_t> id_of_bytes_;  // and back
    struct Merge {
        size_t rank;  // lower ones go first
        int64_t id;   // of both in one
    };
    std::unordered_map<uint64_t, Merge> merges_;  // by `pair`
    bool ignore_merges_ = false;                  // a word that is a token needs none
    bool split_ = true;                           // into words first, by GPT-2's rule
    bool prefix_space_ = false;                   // before a text that does not begin with one
    std::map<int64_t, Added> added_;
    std::map<std::string, int64_t> id_of_;  // of added tokens, by name
    int64_t vocab_size_ = 0, unknown_id_ = -1, bos_id_ = -1, eos_id_ = -1;  // -1: none
};

// Decodes token by token, and never gives half a character.
class TextStream {
public:
    explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
    std::string push(int64_t id);
    std::string flush() { return utf8_.flush(); }

private:
    const Tokenizer& tokenizer_;
    Utf8Stream utf8_;
};

}  // namespace mmmamba
