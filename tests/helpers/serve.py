"""Run `transformers serve` with a tiny backbone on a port of this machine:

    python tests/helpers/serve.py FOLDER PORT PIXELS

The processor's video part needs torchvision; an empty object replaces it (see tiny_backbones.build_processor).
"""

import sys
from types import SimpleNamespace

import transformers
from transformers.cli.serve import Serve
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def load_processor(folder, **_):
    processing_qwen2_5_vl.ProcessorMixin.check_argument_for_proper_class = lambda *_: None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images.size = {"shortest_edge": int(sys.argv[3]), "longest_edge": int(sys.argv[3])}
    video = SimpleNamespace(model_input_names=[], unused_input_names=[])
    processor_class = processing_qwen2_5_vl.Qwen2_5_VLProcessor
    return processor_class(images, tokenizer, video, chat_template=tokenizer.chat_template)


if __name__ == "__main__":
    transformers.AutoProcessor.from_pretrained = load_processor
    Serve(force_model=sys.argv[1], port=int(sys.argv[2]), host="127.0.0.1", device="cpu", dtype="float32")
