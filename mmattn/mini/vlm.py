"""The small vision-language model: how it is built, stored and asked.

A CLIP vision tower of 6 layers, 64 image tokens, and a Llama decoder over a closed vocabulary of
whole words. The folder that `save` writes is a standard one; `AutoModelForImageTextToText` and
`AutoProcessor` load it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmattn.mini import objects

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
IMAGE_TOKENS = (objects.SIZE // objects.PATCH) ** 2
CHAT_TEMPLATE = (
    "<s> {% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate((*SPECIAL, *objects.WORDS))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        extra_special_tokens={"image_token": "<image>"},
    )


def build(layers: int = 6, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return an untrained model and its processor."""
    torch.manual_seed(seed)
    size = 8 * math.ceil((len(SPECIAL) + len(objects.WORDS)) / 8)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=objects.SIZE,
            patch_size=objects.PATCH,
            projection_dim=96,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=True,
        ),
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = EOS
    model.generation_config.bos_token_id = BOS
    model.generation_config.pad_token_id = PAD
    half = [0.5, 0.5, 0.5]
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": objects.SIZE},
            crop_size={"height": objects.SIZE, "width": objects.SIZE},
            image_mean=half,
            image_std=half,
        ),
        tokenizer=_tokenizer(),
        patch_size=objects.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )
    return model, processor


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Turn pictures `[B, 3, Y, X]` in [0, 1] into 8-bit images."""
    array = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


@torch.no_grad()
def reply(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 96,
    batch: int = 64,
    **generate: Any,
) -> list[str]:
    """Answer one prompt per image, greedily unless `generate` says otherwise."""
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": prompt}],
                    }
                ],
                add_generation_prompt=True,
            )
            for prompt in prompts[part]
        ]
        inputs = processor(images=list(images[part]), text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        tokens = model.generate(
            **inputs, **{"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
        )
        answers += processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return answers


def save(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    out: Path,
    *,
    half: bool = False,
) -> None:
    """Write a standard Hugging Face folder, in bfloat16 if `half`; the model itself stays as it
    is."""
    if half:
        model = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(out)
    processor.save_pretrained(out)


def load(folder: Path | str) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Read a folder that `save` wrote, in float32."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, LlavaProcessor.from_pretrained(folder)
