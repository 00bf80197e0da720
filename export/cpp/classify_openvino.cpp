// The best classes of one picture, with OpenVINO: classify_openvino MODEL.onnx PICTURE.ppm
//
// The same arguments and output as classify.cpp. Headers and libraries come with `pip install openvino`; OV below is
// the folder that `python -c "import openvino; print(openvino.__path__[0])"` prints.
// Build: g++ -std=c++17 classify_openvino.cpp -I OV/include -L OV/libs -l:libopenvino.so.NNNN -Wl,-rpath,OV/libs
#include <cstdint>
#include <fstream>
#include <iostream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>

static ov::Tensor read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    size_t width = 0, height = 0, largest = 0;
    file >> magic >> width >> height >> largest;
    if (magic != "P6" || largest != 255) throw std::runtime_error(path + ": must be a binary PPM (P6) of 8 bits");
    file.get();
    ov::Tensor image(ov::element::u8, {1, height, width, 3});
    file.read(reinterpret_cast<char*>(image.data<uint8_t>()), image.get_byte_size());
    if (!file) throw std::runtime_error(path + ": ends too early");
    return image;
}

int main(int argc, char** argv) try {
    if (argc != 3) throw std::runtime_error("usage: classify_openvino MODEL.onnx PICTURE.ppm");
    ov::Tensor image = read_ppm(argv[2]);

    ov::Core core;
    // Without the hint a processor with bfloat16 units computes a float32 graph in bfloat16.
    ov::CompiledModel model = core.compile_model(argv[1], "CPU", ov::hint::inference_precision(ov::element::f32));
    ov::InferRequest request = model.create_infer_request();
    request.set_tensor("image", image);
    request.infer();

    const ov::Tensor index = request.get_tensor("top5_index"), probability = request.get_tensor("top5_probability");
    for (size_t i = 0; i < index.get_size(); ++i)
        std::cout << index.data<int64_t>()[i] << ' ' << probability.data<float>()[i] << '\n';
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
}
