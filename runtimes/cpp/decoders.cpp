#include "decoders.hpp"

#include <algorithm>
#include <cctype>
#include <csetjmp>
#include <cstdio>  // before jpeglib.h, which lacks it
#include <cstring>
#include <new>

#include <jpeglib.h>
#include <jerror.h>
#include <png.h>

#include "files.hpp"

// Both libraries report an error by calling a function that must not return: it jumps back to a
// setjmp. Nothing with a destructor is made between the two.

namespace mmmamba {

namespace {

constexpr uint64_t MOST_PIXELS = 50'000'000;  // tiles never need so many

UserError damaged(const std::string& detail) {
    return UserError("the picture is truncated or damaged (" + detail + "); copy or save it again");
}

void make_room(Decoded& decoded, uint64_t width, uint64_t height) {
    if (width == 0 || height == 0) throw damaged("no pixels");
    if (width > MOST_PIXELS || height > MOST_PIXELS || width * height > MOST_PIXELS) {
        throw UserError(std::to_string(width) + "x" + std::to_string(height) +
                        " is more than 50 megapixels; save it smaller");
    }
    decoded.width = static_cast<int>(width);
    decoded.height = static_cast<int>(height);
    decoded.rgba.resize(4 * width * height);
}

// --- PNG ----------------------------------------------------------------------------------------

struct PngFile {
    const char* bytes;
    size_t left;
    char complaint[128];
    png_structp png;
    png_infop info;

    explicit PngFile(const std::string& file) : bytes(file.data()), left(file.size()), complaint{} {
        png = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, fail,
                                     [](png_structp, const char*) {});
        info = png ? png_create_info_struct(png) : nullptr;
        if (!info) throw std::bad_alloc();
        png_set_read_fn(png, this, read);
    }
    ~PngFile() { png_destroy_read_struct(&png, &info, nullptr); }
    PngFile(const PngFile&) = delete;

    static void fail(png_structp png, const char* message) {
        auto* self = static_cast<PngFile*>(png_get_error_ptr(png));
        std::snprintf(self->complaint, sizeof self->complaint, "%s", message);
        png_longjmp(png, 1);
    }
    static void read(png_structp png, png_bytep to, size_t count) {
        auto* self = static_cast<PngFile*>(png_get_io_ptr(png));
        if (count > self->left) png_error(png, "the file ends early");
        std::memcpy(to, self->bytes, count);
        self->bytes += count;
        self->left -= count;
    }
};

bool read_png_header(PngFile& file) {
    if (setjmp(png_jmpbuf(file.png))) return false;
    png_read_info(file.png, file.info);
    png_set_expand(file.png);  // palettes, greys of few bits and transparent colours
    png_set_strip_16(file.png);
    png_set_gray_to_rgb(file.png);
    png_set_add_alpha(file.png, 255, PNG_FILLER_AFTER);
    png_set_interlace_handling(file.png);
    png_read_update_info(file.png, file.info);
    return true;
}

bool read_png_rows(PngFile& file, png_bytepp rows) {
    if (setjmp(png_jmpbuf(file.png))) return false;
    png_read_image(file.png, rows);
    png_read_end(file.png, file.info);
    return true;
}

// --- JPEG ---------------------------------------------------------------------------------------

struct JpegFile {
    jpeg_decompress_struct info{};
    jpeg_error_mgr errors{};
    std::jmp_buf back;
    char complaint[JMSG_LENGTH_MAX] = {};

    JpegFile() {
        info.err = jpeg_std_error(&errors);
        info.client_data = this;
        errors.error_exit = fail;
        errors.emit_message = [](j_common_ptr common, int) {
            // Only a warning to libjpeg, which would make up the rest of the picture.
            if (common->err->msg_code == JWRN_JPEG_EOF) fail(common);
        };
        jpeg_create_decompress(&info);
    }
    ~JpegFile() { jpeg_destroy_decompress(&info); }
    JpegFile(const JpegFile&) = delete;

    [[noreturn]] static void fail(j_common_ptr common) {
        auto* self = static_cast<JpegFile*>(common->client_data);
        common->err->format_message(common, self->complaint);
        std::longjmp(self->back, 1);
    }
};

bool read_jpeg_header(JpegFile& file, const std::string& bytes) {
    if (setjmp(file.back)) return false;
    jpeg_mem_src(&file.info, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
    jpeg_save_markers(&file.info, JPEG_APP0 + 1, 0xFFFF);  // EXIF
    jpeg_read_header(&file.info, TRUE);
    return true;
}

bool read_jpeg_rows(JpegFile& file, uint8_t* rgba) {
    if (setjmp(file.back)) return false;
    file.info.out_color_space = JCS_EXT_RGBA;
    jpeg_start_decompress(&file.info);
    while (file.info.output_scanline < file.info.output_height) {
        uint8_t* row = rgba + size_t{4} * file.info.output_scanline * file.info.output_width;
        jpeg_read_scanlines(&file.info, &row, 1);
    }
    jpeg_finish_decompress(&file.info);
    return true;
}

}  // namespace

Decoded decode_png(const std::string& bytes) {
    PngFile file(bytes);
    if (!read_png_header(file)) throw damaged(file.complaint);
    Decoded decoded;
    make_room(decoded, png_get_image_width(file.png, file.info),
              png_get_image_height(file.png, file.info));
    std::vector<png_bytep> rows;
    for (int y = 0; y < decoded.height; ++y) {
        rows.push_back(&decoded.rgba[size_t{4} * y * decoded.width]);
    }
    if (!read_png_rows(file, rows.data())) throw damaged(file.complaint);
    png_bytep exif = nullptr;
    png_uint_32 length = 0;
    if (png_get_eXIf_1(file.png, file.info, &length, &exif)) {
        decoded.exif.assign(reinterpret_cast<const char*>(exif), length);
    }
    return decoded;
}

Decoded decode_jpeg(const std::string& bytes) {
    JpegFile file;
    if (!read_jpeg_header(file, bytes)) throw damaged(file.complaint);
    if (file.info.num_components > 3) {
        throw UserError("a JPEG in CMYK, as printers want it; save it as RGB");
    }
    Decoded decoded;
    for (auto marker = file.info.marker_list; marker; marker = marker->next) {
        if (marker->data_length > 6 && !std::memcmp(marker->data, "Exif\0\0", 6)) {
            decoded.exif.assign(reinterpret_cast<const char*>(marker->data) + 6,
                                marker->data_length - 6);
            break;
        }
    }
    make_room(decoded, file.info.image_width, file.info.image_height);
    if (!read_jpeg_rows(file, decoded.rgba.data())) throw damaged(file.complaint);
    return decoded;
}

Decoded decode_pnm(const std::string& file) {
    size_t at = 2;
    const auto number = [&] {  // after white space and comments
        while (at < file.size() &&
               (std::isspace(static_cast<unsigned char>(file[at])) || file[at] == '#')) {
            at = file[at] == '#' ? std::min(file.find('\n', at), file.size()) : at + 1;
        }
        uint64_t value = 0;
        const size_t first = at;
        for (; at < file.size() && file[at] >= '0' && file[at] <= '9' && at - first < 9; ++at) {
            value = 10 * value + (file[at] - '0');
        }
        return value;
    };
    const uint64_t width = number(), height = number(), brightest = number();
    if (brightest != 255) throw UserError("a PPM of other than 8 bits; convert it to PNG");
    Decoded decoded;
    make_room(decoded, width, height);
    const size_t channels = file[1] == '6' ? 3 : 1;
    at += 1;  // one white space
    if (file.size() < at + channels * width * height) throw damaged("the file ends early");
    for (size_t pixel = 0; pixel < width * height; ++pixel, at += channels) {
        for (size_t c = 0; c < 3; ++c) {
            decoded.rgba[4 * pixel + c] = static_cast<uint8_t>(file[at + (channels == 3 ? c : 0)]);
        }
        decoded.rgba[4 * pixel + 3] = 255;
    }
    return decoded;
}

}  // namespace mmmamba
