#include "tensor_file.hpp"

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "files.hpp"
#include "sha256.hpp"

namespace mmmamba {

namespace {

using nlohmann::json;

const std::map<std::string, std::string> NUMPY_NAMES = {
    {"F32", "<f4"}, {"F16", "<f2"}, {"I16", "<i2"}, {"U8", "|u1"}};

int64_t size_of(const Array& array) {
    int64_t count = NUMPY_NAMES.at(array.dtype).back() - '0';
    for (const int64_t size : array.shape) count *= size;
    return count;
}

// Python's str() of a tuple.
std::string tuple(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (shape.size() == 1 ? ",)" : ")");
}

// SHA-256 over metadata, names, shapes and data, written down as Python writes them.
std::string digest(const TensorFile& file) {
    std::string pairs;
    for (const auto& [key, value] : file.metadata) {
        if (key == "sha256") continue;
        const auto ascii = [](const std::string& text) { return json(text).dump(-1, ' ', true); };
        pairs += (pairs.empty() ? "[" : ", [") + ascii(key) + ", " + ascii(value) + "]";
    }
    Sha256 hash;
    hash.update("[" + pairs + "]");
    for (const auto& [name, array] : file.arrays) {
        hash.update("\n" + name + " " + NUMPY_NAMES.at(array.dtype) + " " + tuple(array.shape) +
                    "\n");
        hash.update(array.bytes);
    }
    return hash.hex();
}

void write_all(int handle, std::string_view bytes) {
    while (!bytes.empty()) {
        const ssize_t written = ::write(handle, bytes.data(), bytes.size());
        if (written < 0) throw std::system_error(errno, std::generic_category());
        bytes.remove_prefix(written);
    }
}

}  // namespace

void write_tensors(const std::string& path, const TensorFile& file) {
    json header;
    header["__metadata__"] = file.metadata;
    header["__metadata__"]["sha256"] = digest(file);
    int64_t at = 0;
    for (const auto& [name, array] : file.arrays) {
        const int64_t end = at + size_of(array);
        header[name] = {
            {"dtype", array.dtype}, {"shape", array.shape}, {"data_offsets", {at, end}}};
        at = end;
    }
    std::string text = header.dump();
    text.append((8 - text.size() % 8) % 8, ' ');
    std::string length;
    for (int shift = 0; shift < 64; shift += 8) length += static_cast<char>(text.size() >> shift);

    // Beside the file, and renamed once it is whole; mkstemp makes it the owner's alone.
    std::string part = path + ".XXXXXX";
    const int handle = ::mkstemp(part.data());
    try {
        if (handle < 0) throw std::system_error(errno, std::generic_category());
        write_all(handle, length + text);
        for (const auto& [name, array] : file.arrays) write_all(handle, array.bytes);
        if (::fsync(handle) < 0) throw std::system_error(errno, std::generic_category());
        ::close(handle);
        std::filesystem::rename(part, path);
    } catch (const std::system_error& error) {
        if (handle >= 0) ::unlink(part.c_str());
        throw UserError(path + ": cannot be written (" + error.code().message() + ")");
    }
}

TensorFile read_tensors(const std::string& path) {
    const std::string bytes = read_file(path);
    uint64_t length = 0;
    for (int i = 7; i >= 0 && bytes.size() >= 8; --i) {
        length = length << 8 | static_cast<unsigned char>(bytes[i]);
    }
    if (bytes.size() < 8 || length > bytes.size() - 8) {
        throw UserError(path + ": not a session file, or a truncated one");
    }
    TensorFile file;
    try {
        const json header = json::parse(bytes.substr(8, length));
        for (const auto& [name, entry] : header.items()) {
            if (name == "__metadata__") {
                file.metadata = entry.get<decltype(file.metadata)>();
                continue;
            }
            const auto offsets = entry.at("data_offsets").get<std::vector<uint64_t>>();
            Array array{entry.at("dtype"), entry.at("shape"), ""};
            const uint64_t data = bytes.size() - 8 - length;
            if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data ||
                !NUMPY_NAMES.count(array.dtype)) {
                throw UserError(path + ": a damaged or truncated session file");
            }
            array.bytes = bytes.substr(8 + length + offsets[0], offsets[1] - offsets[0]);
            file.arrays[name] = std::move(array);
        }
    } catch (const json::exception& error) {
        throw UserError(path + ": not a session file (" + error.what() + ")");
    }
    if (file.metadata["sha256"] != digest(file)) {
        throw UserError(path +
                        ": damaged, the contents do not match their hash; it cannot be used");
    }
    for (const auto& [name, array] : file.arrays) {
        if (size_of(array) != static_cast<int64_t>(array.bytes.size())) {
            throw UserError(path + ": " + name +
                            " has not the size of its shape; it cannot be used");
        }
    }
    return file;
}

}  // namespace mmmamba
