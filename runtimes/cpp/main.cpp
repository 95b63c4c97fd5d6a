// mmmamba_chat: show a model pictures and talk about them. The answer goes to stdout as it is made,
// everything else to stderr.
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "files.hpp"
#include "session.hpp"
#include "sha256.hpp"

using namespace mmmamba;

namespace {

using nlohmann::ordered_json;

const char* const USAGE =
    R"(usage: mmmamba_chat MODEL.pte [--tokenizer FILE] [--image FILE]... [--prompt TEXT]...
                    [--session FILE] [--max-new-tokens N] [--threads N] [--json]

Show a model pictures and talk about them. Without --prompt: one question a line from stdin, where
"/image FILE" shows a picture with the next one.

  --tokenizer FILE     tokenizer.json (default: tokenizer/tokenizer.json beside the model)
  --image FILE         a picture for the first question: PNG, JPEG, PPM or PGM
  --prompt TEXT        ask this; given again, the next turn of the same conversation
  --session FILE       go on from this file if it is there, and keep the conversation in it
  --max-new-tokens N   tokens of an answer at most (default: 512)
  --threads N          CPU threads (default: ExecuTorch's choice)
  --json               print one JSON object at the end

example: mmmamba_chat model.pte --image photo.jpg --prompt "What is this?"
)";

struct Options {
    std::string model, tokenizer, session;
    std::vector<std::string> images, prompts;
    int64_t max_new_tokens = 512;
    int threads = 0;
    bool json = false;
};

int whole_number(const std::string& flag, const std::string& text) {
    const bool digits = !text.empty() && text.find_first_not_of("0123456789") == text.npos;
    if (!digits || text.size() > 9 || std::stoi(text) < 1) {
        throw UserError(flag + " is '" + text + "'; expected a whole number above 0");
    }
    return std::stoi(text);
}

Options parse(const std::vector<std::string>& words) {
    Options options;
    for (size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        const auto value = [&] {
            if (i + 1 == words.size()) throw UserError(word + " needs a value");
            return words[++i];
        };
        if (word == "--tokenizer") options.tokenizer = value();
        else if (word == "--image") options.images.push_back(value());
        else if (word == "--prompt") options.prompts.push_back(value());
        else if (word == "--session") options.session = value();
        else if (word == "--max-new-tokens") options.max_new_tokens = whole_number(word, value());
        else if (word == "--threads") options.threads = whole_number(word, value());
        else if (word == "--json") options.json = true;
        else if (word[0] == '-') throw UserError("unknown flag " + word + "; --help lists them");
        else if (options.model.empty()) options.model = word;
        else throw UserError("one model only, not '" + word + "' too");
    }
    if (options.model.empty()) throw UserError("name a model; --help says how");
    if (options.tokenizer.empty()) {
        const auto beside = std::filesystem::path(options.model).parent_path() / "tokenizer";
        options.tokenizer = (beside / "tokenizer.json").string();
    }
    return options;
}

// UserError unless the files are those that the model was exported with.
void check_tokenizer_files(const std::string& tokenizer, const Manifest& manifest) {
    const auto& wanted = manifest.tokenizer_sha256;
    if (!wanted.empty() && !wanted.count("tokenizer.json")) {
        throw UserError("this model's tokenizer is " + wanted.begin()->first +
                        "; this program reads tokenizer.json only: run the model with Python");
    }
    for (const auto& [name, digest] : wanted) {
        const auto beside = std::filesystem::path(tokenizer).parent_path() / name;
        const std::string file = name == "tokenizer.json" ? tokenizer : beside.string();
        if (sha256(read_file(file)) != digest) {
            throw UserError(
                file + ": another tokenizer; this model was exported with one of sha256 " + digest);
        }
    }
}

// Without control characters but newline and tab: an answer must not steer the terminal.
std::string harmless(const std::string& text) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const Character character = next_character(std::string_view(text).substr(at));
        const char32_t code = character.code;
        const bool control =
            (code < 32 && code != '\n' && code != '\t') || (code >= 127 && code < 160);
        if (!control) out += text.substr(at, character.length);
        at += character.length;
    }
    return out;
}

std::string stripped(const std::string& text) {
    const char* const spaces = " \t\r\n\f\v\x1c\x1d\x1e\x1f";  // of ASCII, Python's
    const size_t first = text.find_first_not_of(spaces);
    return first == text.npos ? "" : text.substr(first, text.find_last_not_of(spaces) - first + 1);
}

double rounded(double value, double scale) { return std::round(value * scale) / scale; }

class Dialogue {
public:
    Dialogue(Session& session, const Model& model, const Options& options)
        : session_(session), manifest_(model.manifest()), options_(options) {}

    void show(const std::string& file) {
        pictures_.push_back(load_picture(file));
        names_.push_back(file);
    }

    void ask(const std::string& question) {
        check_utf8(question, "prompt");
        std::string said;
        const bool to_terminal = ::isatty(STDOUT_FILENO);
        const Answer& answer = session_.ask(
            question, pictures_, options_.max_new_tokens, [&](const std::string& piece) {
                said += piece;
                if (!options_.json)
                    std::cout << (to_terminal ? harmless(piece) : piece) << std::flush;
            });
        if (!options_.session.empty()) session_.save(options_.session);
        if (!options_.json) std::cout << std::endl;
        report(answer.stats);
        turns_.push_back({{"prompt", question},
                          {"images", names_},
                          {"answer", stripped(said)},
                          {"token_ids", answer.ids},
                          {"finish_reason", answer.reason},
                          {"stats", figures(answer.stats)}});
        pictures_.clear();
        names_.clear();
    }

    void read_lines() {
        const bool watched = ::isatty(STDIN_FILENO);
        std::string line;
        while (watched && std::cerr << "> ", std::getline(std::cin, line)) {
            line = stripped(line);
            if (line.rfind("/image ", 0) == 0) {
                show(stripped(line.substr(7)));
            } else if (!line.empty() && line[0] == '/') {
                throw UserError("unknown command " + line + "; known is /image FILE");
            } else if (!line.empty()) {
                ask(line);
            }
        }
    }

    ordered_json summary() const {
        return {{"model",
                 {{"model_id", manifest_.model_id},
                  {"quant", manifest_.quant},
                  {"variant", manifest_.variant}}},
                {"turns", turns_},
                {"answer", turns_.empty() ? ordered_json() : turns_.back()["answer"]}};
    }

private:
    static void report(const Stats& stats) {
        char line[160];
        std::snprintf(
            line, sizeof line,
            "%lld tokens at %.1f tok/s; prompt %lld tokens in %.2f s; context %lld tokens\n",
            static_cast<long long>(stats.generated_tokens), stats.speed(),
            static_cast<long long>(stats.prompt_tokens), stats.prefill_s,
            static_cast<long long>(stats.context_tokens));
        std::cerr << line;
    }

    ordered_json figures(const Stats& stats) const {
        return {{"turn", stats.turn},
                {"prompt_tokens", stats.prompt_tokens},
                {"generated_tokens", stats.generated_tokens},
                {"steps", stats.steps},
                {"context_tokens", stats.context_tokens},
                {"state_bytes", manifest_.state_bytes},
                {"prefill_s", rounded(stats.prefill_s, 1e4)},
                {"decode_s", rounded(stats.decode_s, 1e4)},
                {"first_token_s", rounded(stats.first_token_s, 1e4)},
                {"tokens_per_s", rounded(stats.speed(), 1e2)},
                {"prefill_tokens_per_s", rounded(stats.prefill_speed(), 1e2)}};
    }

    Session& session_;
    const Manifest& manifest_;
    const Options& options_;
    std::vector<Picture> pictures_;  // for the next question
    std::vector<std::string> names_;
    ordered_json turns_ = ordered_json::array();
};

int run(const std::vector<std::string>& words) {
    for (const std::string& word : words) {
        if (word == "--help" || word == "-h") {
            std::cout << USAGE;
            return 0;
        }
    }
    const Options options = parse(words);
    Model model(options.model, options.threads);
    check_tokenizer_files(options.tokenizer, model.manifest());
    const Tokenizer tokenizer(options.tokenizer);
    Session session(model, tokenizer);
    if (!options.session.empty() && std::filesystem::exists(options.session)) {
        session.load(options.session);
    }
    Dialogue dialogue(session, model, options);
    for (const std::string& image : options.images) dialogue.show(image);
    for (const std::string& prompt : options.prompts) dialogue.ask(prompt);
    if (options.prompts.empty()) dialogue.read_lines();
    if (options.json) std::cout << dialogue.summary().dump() << std::endl;
    return 0;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run({words + 1, words + count});
    } catch (const UserError& error) {
        std::cerr << "mmmamba_chat: error: " << error.what() << "\n";
        return 2;
    } catch (const std::exception& error) {  // out of memory, a full disk
        std::cerr << "mmmamba_chat: " << error.what() << "\n";
        return 1;
    }
}
