// What the program reads: JSON (a bundle's manifest) and safetensors (a noise file). The standard library alone.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

// A problem that the user can solve: one line.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A JSON value. The accessors throw Failure if it is of another kind, and name its place.
class Json {
  public:
    static Json parse(const std::string& text, const std::string& where) {
        Json value;
        value.place_ = where;
        const char* at = text.c_str();
        value.read(at, 0);
        skip(at);
        if (at != text.c_str() + text.size()) value.fail("JSON");
        return value;
    }

    bool is_null() const { return kind_ == Kind::null; }

    double number() const { return require(Kind::number, "a number").number_; }

    // A whole number that is not negative: a size, a class or a place in a file.
    size_t size() const {
        if (!(number() >= 0 && number() < 9e15 && number() == std::floor(number()))) fail("a size");
        return static_cast<size_t>(number_);
    }

    const std::string& text() const { return require(Kind::text, "a text").text_; }

    const std::vector<Json>& items() const { return require(Kind::array, "a list").items_; }

    const std::vector<std::string>& names() const { return require(Kind::object, "an object").names_; }

    bool has(const std::string& name) const {
        for (const auto& each : names())
            if (each == name) return true;
        return false;
    }

    const Json& operator[](const std::string& name) const {
        for (size_t i = 0; i < names().size(); ++i)
            if (names_[i] == name) return items_[i];
        throw Failure(place_ + ": it has no '" + name + "'.");
    }

    // [null, 3, 16, 16] -> {3, 16, 16}: null stands for rows.
    std::vector<size_t> shape() const {
        std::vector<size_t> sizes;
        for (const auto& each : items())
            if (!each.is_null()) sizes.push_back(each.size());
        return sizes;
    }

    [[noreturn]] void fail(const std::string& expected) const {
        throw Failure(place_ + ": expected " + expected + ".");
    }

  private:
    enum class Kind { null, boolean, number, text, array, object };
    static constexpr int most_depth = 64;

    static void skip(const char*& at) { at += std::strspn(at, " \t\r\n"); }

    static bool take(const char*& at, const char* word) {
        const size_t length = std::strlen(word);
        if (std::strncmp(at, word, length) != 0) return false;
        at += length;
        return true;
    }

    const Json& require(Kind kind, const char* expected) const {
        if (kind_ != kind) fail(expected);
        return *this;
    }

    // `at` ends with a zero byte, which no rule takes.
    void read(const char*& at, int depth) {
        if (depth > most_depth) fail("JSON of less depth");
        skip(at);
        if (take(at, "null")) return;
        if (take(at, "true") || take(at, "false")) {
            kind_ = Kind::boolean;
        } else if (*at == '"') {
            kind_ = Kind::text;
            text_ = string(at);
        } else if (*at == '[' || *at == '{') {
            read_items(at, depth);
        } else {
            char* end = nullptr;
            kind_ = Kind::number;
            number_ = std::strtod(at, &end);
            if (end == at || !std::isfinite(number_)) fail("JSON");
            at = end;
        }
    }

    void read_items(const char*& at, int depth) {
        kind_ = *at == '{' ? Kind::object : Kind::array;
        const char* close = *at == '{' ? "}" : "]";
        skip(++at);
        if (take(at, close)) return;
        do {
            Json item;
            item.place_ = place_;
            if (kind_ == Kind::object) {
                skip(at);
                names_.push_back(string(at));
                item.place_ += ": '" + names_.back() + "'";
                skip(at);
                if (!take(at, ":")) fail("JSON");
            }
            item.read(at, depth + 1);
            items_.push_back(std::move(item));
            skip(at);
        } while (take(at, ","));
        if (!take(at, close)) fail("JSON");
    }

    // A character beyond ASCII that is escaped becomes '?': no text that the program compares has any.
    std::string string(const char*& at) const {
        if (*at != '"') fail("JSON");
        std::string text;
        for (++at; *at != '"'; ++at) {
            if (static_cast<unsigned char>(*at) < 0x20) fail("JSON");
            if (*at != '\\') {
                text += *at;
                continue;
            }
            static constexpr char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
            const char* letter = *++at == 0 ? nullptr : std::strchr(letters, *at);
            if (letter != nullptr) {
                text += meanings[letter - letters];
            } else if (*at == 'u' && std::strspn(at + 1, "0123456789abcdefABCDEF") >= 4) {
                const long code = std::strtol(std::string(at + 1, at + 5).c_str(), nullptr, 16);
                text += code < 0x80 ? static_cast<char>(code) : '?';
                at += 4;
            } else {
                fail("JSON");
            }
        }
        ++at;
        return text;
    }

    Kind kind_ = Kind::null;
    double number_ = 0;
    std::string text_, place_;
    std::vector<std::string> names_;  // of an object's items
    std::vector<Json> items_;
};

inline std::string read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file || std::filesystem::is_directory(path)) throw Failure(path.string() + ": cannot be read.");
    return {std::istreambuf_iterator<char>(file), {}};
}

inline size_t product(const std::vector<size_t>& sizes) {
    size_t count = 1;
    for (size_t size : sizes) {
        if (size != 0 && count > (size_t{1} << 40) / size) throw Failure("a shape of too many elements.");
        count *= size;
    }
    return count;
}

// A safetensors file: 8 bytes n (little-endian, as this machine must be), n bytes of JSON, the bytes of the tensors.
class Tensors {
  public:
    explicit Tensors(const std::filesystem::path& path) : place_(path.string()), bytes_(read_file(path)) {
        std::uint64_t length = 0;
        if (bytes_.size() >= sizeof length) std::memcpy(&length, bytes_.data(), sizeof length);
        if (bytes_.size() < sizeof length || length > bytes_.size() - sizeof length)
            throw Failure(place_ + ": not a safetensors file.");
        header_ = Json::parse(bytes_.substr(sizeof length, length), place_);
        start_ = sizeof length + length;
    }

    const Json& header() const { return header_; }

    std::vector<size_t> shape(const std::string& name) const { return header_[name]["shape"].shape(); }

    template <typename Number>  // float or double
    std::vector<Number> read(const std::string& name) const {
        const Json& entry = header_[name];
        const auto& places = entry["data_offsets"].items();
        const size_t size = product(shape(name)) * sizeof(Number);
        const std::string type = sizeof(Number) == 4 ? "F32" : "F64";
        if (entry["dtype"].text() != type || places.size() != 2 || places[0].size() > bytes_.size() - start_ ||
            size > bytes_.size() - start_ - places[0].size() || places[1].size() != places[0].size() + size)
            throw Failure(place_ + ": '" + name + "' is damaged, or not " + type + ". Write the file again.");
        std::vector<Number> numbers(size / sizeof(Number));
        std::memcpy(numbers.data(), bytes_.data() + start_ + places[0].size(), size);
        return numbers;
    }

  private:
    std::string place_, bytes_;
    Json header_;
    size_t start_ = 0;
};
