"""Tiny random transformers models and one call for each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import transformers as hf
from transformers.utils import logging

import mmattn

logging.set_verbosity_error()

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
IMAGE = 150


def pixels(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(images, tokens, texts=None, left_pad=True, image=IMAGE):
    """Rows of ``<s> a b <image>*tokens c d e``, one image unless `images` says otherwise."""
    rows = []
    for i, count in enumerate(images):
        body = [image] * tokens if isinstance(tokens, int) else [image] * tokens[i]
        extra = [3 + i] * (0 if texts is None else texts[i])
        rows.append([1, 5, *extra, *([6, *body] * count), 7, 8 + i, 9])
    width = max(len(r) for r in rows)
    pads = [[0] * (width - len(r)) for r in rows]
    pairs = zip(pads, rows, strict=True)
    ids = torch.tensor([p + r if left_pad else r + p for p, r in pairs])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def llama_config(layers=4, **kw):
    return hf.LlamaConfig(
        **{
            "vocab_size": 200,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **kw,
        }
    )


def clip_vision(**kw):
    return hf.CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            **kw,
        }
    )


def build(cls, config, implementation="sdpa"):
    torch.manual_seed(0)
    model = cls(config).eval()
    model.set_attn_implementation(implementation)
    return model


def llava(implementation="sdpa", layers=4, **kw):
    config = hf.LlavaConfig(
        vision_config=clip_vision(),
        text_config=llama_config(layers),
        image_token_index=IMAGE,
        image_seq_length=16,
        **{"vision_feature_layer": -1, **kw},
    )
    return build(hf.LlavaForConditionalGeneration, config, implementation)


def llava_call(images=(1, 1), texts=(2, 0)):
    return {**prompt(images, 16, texts), "pixel_values": pixels(sum(images), 3, 56, 56)}


def llava_next(implementation="sdpa"):
    config = hf.LlavaNextConfig(
        vision_config=clip_vision(),
        text_config=llama_config(2),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    return build(hf.LlavaNextForConditionalGeneration, config, implementation)


def llava_next_call(model, sizes=((100, 60), (50, 100))):
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = torch.tensor(sizes)
    counts = [image_size_to_num_patches(s, model.config.image_grid_pinpoints, 56) for s in sizes]
    values = pixels(len(sizes), max(counts), 3, 56, 56)
    with torch.no_grad():
        out = model.get_image_features(values, sizes, return_dict=True)
    lengths = [len(f) for f in out.pooler_output]
    ids = prompt([1] * len(sizes), lengths)
    return {**ids, "pixel_values": values, "image_sizes": sizes}


_QWEN_TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
_QWEN_IDS = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}


def qwen25(implementation="sdpa"):
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
        "window_size": 112,
    }
    config = hf.Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_IDS)
    return build(hf.Qwen2_5_VLForConditionalGeneration, config, implementation)


def qwen2(implementation="sdpa"):
    vision = {"depth": 4, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=vision, **_QWEN_IDS)
    return build(hf.Qwen2VLForConditionalGeneration, config, implementation)


def qwen_call(grids=((12, 20), (8, 12))):
    rows = []
    for i, (y, x) in enumerate(grids):
        rows.append([5, 6, 252, *([250] * (y * x // 4)), 253, 7, 8 + i, 9])
    width = max(len(r) for r in rows)
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == 250).long(),
        "image_grid_thw": torch.tensor([[1, y, x] for y, x in grids]),
        "pixel_values": pixels(sum(y * x for y, x in grids), 3 * 2 * 14 * 14),
    }


def instructblip(implementation="sdpa"):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = hf.InstructBlipConfig(
        vision_config={**small, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14},
        qformer_config={
            **small,
            "num_hidden_layers": 2,
            "vocab_size": 50,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
        },
        text_config=llama_config(2).to_dict(),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return build(hf.InstructBlipForConditionalGeneration, config, implementation)


def instructblip_call():
    questions = torch.tensor([[3, 4, 5], [6, 7, 8]])
    return {
        **prompt((1, 1), 4, (0, 2)),
        "pixel_values": pixels(2, 3, 56, 56),
        "qformer_input_ids": questions,
        "qformer_attention_mask": torch.ones_like(questions),
    }


def _idefics3(config, cls, implementation):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    made = config(
        vision_config=vision,
        text_config=llama_config(2).to_dict(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return build(cls, made, implementation)


def idefics3(implementation="sdpa"):
    return _idefics3(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, implementation)


def smolvlm(implementation="sdpa"):
    return _idefics3(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, implementation)


def idefics3_call():
    return {**prompt((1, 1), 4, (0, 3)), "pixel_values": pixels(2, 1, 3, 56, 56)}


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {"vocab_size": 100, "max_position_embeddings": 16, **_TOWER}
_VISION = {"image_size": 32, "patch_size": 8, **_TOWER}


def clip(implementation="sdpa"):
    text = {**_TEXT, "eos_token_id": 99, "bos_token_id": 98}
    config = hf.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    return build(hf.CLIPModel, config, implementation)


def siglip(implementation="sdpa"):
    config = hf.SiglipConfig(text_config=_TEXT, vision_config=_VISION)
    return build(hf.SiglipModel, config, implementation)


def pair_call():
    return {"input_ids": torch.arange(14).view(2, 7), "pixel_values": pixels(2, 3, 32, 32)}


def vit(implementation="sdpa"):
    return build(hf.ViTForImageClassification, hf.ViTConfig(**_VISION), implementation)


def llama(implementation="sdpa"):
    return build(hf.LlamaForCausalLM, llama_config(2), implementation)


def one_block(name):
    """A model with a single attention block and its call, for compiling."""
    small = {**_TOWER, "num_hidden_layers": 1}
    if name == "llama":
        padded = prompt((0, 0), 0, (0, 3))
        return build(hf.LlamaModel, llama_config(1)), {**padded, "use_cache": False}
    config = {"clip": hf.CLIPVisionConfig, "siglip": hf.SiglipVisionConfig, "vit": hf.ViTConfig}
    model = {"clip": hf.CLIPVisionModel, "siglip": hf.SiglipVisionModel, "vit": hf.ViTModel}
    made = config[name](**{**small, "image_size": 32, "patch_size": 8})
    return build(model[name], made), {"pixel_values": pixels(2, 3, 32, 32)}


# name: (builder, call of the model, sites)
ALL = {
    "llava": (llava, lambda m: llava_call(), 8),
    "llava-next": (llava_next, llava_next_call, 6),
    "qwen2-vl": (qwen2, lambda m: qwen_call(), 7),
    "qwen2.5-vl": (qwen25, lambda m: qwen_call(), 7),
    "instructblip": (instructblip, lambda m: instructblip_call(), 8),
    "idefics3": (idefics3, lambda m: idefics3_call(), 4),
    "smolvlm": (smolvlm, lambda m: idefics3_call(), 4),
    "clip": (clip, lambda m: pair_call(), 4),
    "siglip": (siglip, lambda m: pair_call(), 4),
    "vit": (vit, lambda m: {"pixel_values": pixels(2, 3, 32, 32)}, 2),
    "llama": (llama, lambda m: prompt((0, 0), 0, (0, 3)), 2),
}
VLMS = [n for n in ALL if n not in ("clip", "siglip", "vit", "llama")]


def logits(model, call):
    with torch.no_grad():
        out = model(**call)
    return out.logits if hasattr(out, "logits") else out.logits_per_image


def tokens(model, call, **kw):
    with torch.no_grad():
        return model.generate(**call, **{**GREEDY, **kw})


def made(name, implementation="sdpa"):
    build, call, sites = ALL[name]
    model = build(implementation)
    return model, call(model), sites


@dataclass(frozen=True)
class Watch(mmattn.Method):
    """Keeps layouts, masks, shapes and outputs of every call in `log`; changes nothing."""

    name: ClassVar[str] = "watch"
    observes: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    grouped: ClassVar[bool] = True
    opaque: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross")
    log: ClassVar[list] = []
    needs_twin: bool = False

    @property
    def twin(self):
        return self.needs_twin

    def attend(self, q, k, v, *, mask, scale, site, dense):
        out = dense(q, k, v)
        self.log.append((site, site.layout, mask, q.shape, k.shape, site.causal, out))
        return out
