#include "model.hpp"

#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "files.hpp"

// The wheel has this function in libexecutorch_threadpool.so, but not its header.
namespace executorch::extension::threadpool {
class ThreadPool {
public:
    bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace mmmamba {

namespace {

using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Program;

const char* const MANIFEST = "mmmamba_manifest";
const char* const METHODS[] = {"token_embedding", "vision_encoder", "text_decoder", MANIFEST};

// --- what ExecuTorch logs: kept for the one line that an error is -------------------------------

std::string last_complaint;

void keep_complaint(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t,
                    const char* message, size_t length) {
    if (level == kError || level == kFatal) last_complaint.assign(message, length);
}

UserError failure(const std::string& path, const std::string& what, Error error) {
    const std::string detail = last_complaint.empty() ? to_string(error) : last_complaint;
    return UserError(path + ": ExecuTorch cannot " + what + " (" + detail + ")");
}

// --- the file -----------------------------------------------------------------------------------

// UserError unless `path` is a .pte, and as long as its header says: ExecuTorch reads beyond the
// end of a shorter one. The header (its schema/extended_header.h): 8 bytes of flatbuffer, "eh00",
// the header's length, the program's size, where segments begin and, in newer files, their size.
void check_whole(const std::string& path) {
    namespace fs = std::filesystem;
    if (!fs::is_regular_file(path)) throw UserError(path + ": no such file; expected a .pte");
    std::ifstream file(path, std::ios::binary);
    unsigned char head[40] = {};
    file.read(reinterpret_cast<char*>(head), sizeof head);
    const auto number = [&](int at, int bytes) {
        uint64_t value = 0;
        for (int i = bytes - 1; i >= 0; --i) value = value << 8 | head[at + i];
        return value;
    };
    if (file.gcount() < 32 || std::memcmp(head + 4, "ET", 2) || std::memcmp(head + 8, "eh00", 4)) {
        throw UserError(path + ": not an ExecuTorch program; expected a .pte");
    }
    const uint64_t program = number(16, 8), segments = number(24, 8);
    const uint64_t data = number(12, 4) >= 32 ? number(32, 8) : 0;
    const uint64_t expected = std::max(segments ? segments + data : program, segments);
    if (fs::file_size(path) < expected) {
        throw UserError(path + ": truncated, " + std::to_string(fs::file_size(path)) +
                        " bytes of " + std::to_string(expected) + "; copy or export it again");
    }
}

}  // namespace

Model::Model(const std::string& path, int threads) : path_(path) {
    check_whole(path);
    executorch::runtime::register_pal(
        executorch::runtime::PalImpl::create(keep_complaint, __FILE__));
    if (threads > 0) {
        executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
    }
    // Mapped: weights are copied into XNNPACK's own layout, so the file's bytes are read once.
    module_ = std::make_unique<Module>(path, Module::LoadMode::Mmap);
    const Error loaded = module_->load(Program::Verification::InternalConsistency);
    if (loaded != Error::Ok) throw failure(path, "load it", loaded);
    const auto names = module_->method_names();
    if (!names.ok()) throw failure(path, "list its methods", names.error());
    for (const char* method : METHODS) {
        if (!names->count(method)) {
            throw UserError(path + ": has no method " + method +
                            "; expected a file of `mmmamba-edge export --to executorch`");
        }
    }
    const auto text = module_->get(MANIFEST);
    if (!text.ok()) throw failure(path, std::string("run ") + MANIFEST, text.error());
    const auto view = text->toString();
    manifest_ = read_manifest({view.data(), view.size()}, path + " (" + MANIFEST + ")");
    for (const char* method : {"token_embedding", "text_decoder"}) {  // vision: with a picture
        const Error error = module_->load_method(method);
        if (error != Error::Ok) throw failure(path, std::string("load ") + method, error);
    }
    const auto meta = module_->method_meta("text_decoder");
    if (!meta.ok()) throw failure(path, "describe text_decoder", meta.error());
    const auto inputs = meta->input_tensor_meta(0);  // (1, tokens, hidden), tokens at their most
    if (!inputs.ok()) throw failure(path, "describe text_decoder", inputs.error());
    chunk_ = inputs->sizes()[1];
}

float* Model::read(const std::vector<int64_t>& ids, const std::vector<Tile>& tiles) {
    for (const int64_t id : ids) {
        if (id < 0 || id >= manifest_.vocab_size) {
            throw UserError("token " + std::to_string(id) + " leaves the vocabulary of " +
                            std::to_string(manifest_.vocab_size));
        }
    }
    const std::vector<float> images = image_vectors(tiles);
    const float *image = images.data(), *end = image + images.size();
    float* logits = nullptr;
    for (size_t at = 0; at < ids.size();) {
        const auto count = static_cast<int32_t>(std::min<size_t>(chunk_, ids.size() - at));
        std::vector<int64_t> part(ids.begin() + at, ids.begin() + at + count);
        auto vectors =
            run("token_embedding",
                {from_blob(part.data(), {1, count}, executorch::aten::ScalarType::Long)});
        const int64_t hidden = vectors.size(2);
        for (int32_t i = 0; i < count; ++i) {
            if (part[i] != manifest_.image_token) continue;
            if (image + hidden > end) {
                throw UserError("more image tokens than the pictures have vectors");
            }
            std::copy_n(image, hidden, vectors.mutable_data_ptr<float>() + i * hidden);
            image += hidden;
        }
        auto out = run("text_decoder",
                       {vectors, from_blob(&tokens_, {1}, executorch::aten::ScalarType::Long)});
        if (out.numel() != manifest_.vocab_size) {
            throw UserError(path_ + ": gives " + std::to_string(out.numel()) +
                            " logits; expected " + std::to_string(manifest_.vocab_size));
        }
        logits = out.mutable_data_ptr<float>();
        tokens_ += count;
        at += count;
    }
    if (image != end) throw UserError("the pictures have more vectors than there are image tokens");
    return logits;
}

std::vector<float> Model::image_vectors(const std::vector<Tile>& tiles) {
    const int side = manifest_.tiles.side;
    std::vector<float> vectors;
    for (const Tile& tile : tiles) {
        auto out =
            run("vision_encoder", {from_blob(const_cast<float*>(tile.data()), {1, 3, side, side})});
        const float* data = out.const_data_ptr<float>();  // (1, tokens per tile, hidden)
        vectors.insert(vectors.end(), data, data + out.numel());
    }
    return vectors;
}

executorch::aten::Tensor Model::run(const char* method, const std::vector<EValue>& inputs) {
    auto output = module_->get(method, inputs);
    if (!output.ok()) throw failure(path_, std::string("run ") + method, output.error());
    return output->toTensor();
}

std::vector<float*> Model::state() {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // Module offers no other way to it
    const auto decoder = module_->method("text_decoder");
#pragma GCC diagnostic pop
    if (!decoder.ok()) throw failure(path_, "load text_decoder", decoder.error());
    std::vector<float*> buffers;
    for (const auto& [name, shape] : manifest_.state) {
        const size_t dot = name.find('.');
        const std::string buffer =
            "layers." + name.substr(0, dot) + ".attention" + name.substr(dot);
        auto tensor = (*decoder)->get_attribute(buffer);
        if (!tensor.ok()) throw failure(path_, "find " + buffer, tensor.error());
        int64_t count = 1;
        for (const int64_t size : shape) count *= size;
        if (tensor->numel() != count) throw UserError(path_ + ": " + buffer + " has another size");
        buffers.push_back(tensor->mutable_data_ptr<float>());
    }
    return buffers;
}

}  // namespace mmmamba
