// The one error that a user meets, and whole files as strings.
#pragma once

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mmmamba {

// Bad input: the message names the file or flag, what was expected and what to do. Exit code 2.
struct UserError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A file's bytes; UserError where it cannot be read.
inline std::string read_file(const std::string& path) {
    errno = 0;
    std::string bytes;
    if (std::FILE* file = std::fopen(path.c_str(), "rb")) {
        char part[1 << 16];
        while (const size_t count = std::fread(part, 1, sizeof part, file))
            bytes.append(part, count);
        const int failed = std::ferror(file) ? errno : 0;  // as for a folder, which opens
        std::fclose(file);
        if (!failed) return bytes;
        errno = failed;
    }
    throw UserError(path + ": cannot be read (" + std::strerror(errno) + ")");
}

}  // namespace mmmamba
