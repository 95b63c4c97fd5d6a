// For tests: what the parts make of a file, to be compared with the Python package.
//
//     parts_check ids TOKENIZER.json FILE             token ids of the file's text, as a JSON list
//     parts_check text TOKENIZER.json ID...           the text of ids
//     parts_check tiles PICTURE SIDE FEWEST MOST      pixel values (tiles, 3, side, side) float32
//     parts_check sha256 FILE
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <vector>

#include "files.hpp"
#include "sha256.hpp"
#include "tiles.hpp"
#include "tokenizer.hpp"

using namespace mmmamba;

int main(int count, char** words) {
    const std::vector<std::string> args(words + 1, words + count);
    try {
        if (args.size() == 3 && args[0] == "ids") {
            const Tokenizer tokenizer(args[1]);
            std::cout << nlohmann::json(tokenizer.encode({{Segment::text, read_file(args[2])}}));
        } else if (args.size() >= 2 && args[0] == "text") {
            const Tokenizer tokenizer(args[1]);
            TextStream stream(tokenizer);
            for (size_t i = 2; i < args.size(); ++i) std::cout << stream.push(std::stoll(args[i]));
            std::cout << stream.flush();
        } else if (args.size() == 5 && args[0] == "tiles") {
            const TileRules rules{std::stoi(args[2]), std::stoi(args[3]), std::stoi(args[4])};
            for (const Tile& tile : picture_tiles(load_picture(args[1]), rules)) {
                std::fwrite(tile.data(), sizeof(float), tile.size(), stdout);
            }
        } else if (args.size() == 2 && args[0] == "sha256") {
            std::cout << sha256(read_file(args[1]));
        } else {
            throw UserError("usage: see parts_check.cpp");
        }
    } catch (const UserError& error) {
        std::cerr << error.what() << "\n";
        return 2;
    }
    return 0;
}
