"""The published files: NaN in any of them, and keys behind a prefix, are refused by name."""

import pytest
import tiny_weights
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from data.world import open_policy
from pretrained.encoders import load_image_encoder, load_text_encoder
from pretrained.vae import load_vae
from pretrained.weights import DIT, IMAGE_FILE, REDIRECTOR, TEXT_FILE, VAE_FILE

LOAD = {DIT: None, REDIRECTOR: None, VAE_FILE: load_vae, TEXT_FILE: load_text_encoder, IMAGE_FILE: load_image_encoder}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights.write(tmp_path_factory.mktemp("weights"))


def copy_with(weights, folder, name, change):
    """A folder of the weights in which one file's state dict is changed."""
    for file in weights.iterdir():
        (folder / file.name).symlink_to(file)
    state = load_file(weights / name) if name.endswith("safetensors") else torch.load(weights / name)
    (folder / name).unlink()
    save = save_file if name.endswith("safetensors") else torch.save
    save(change({key: x.clone() for key, x in state.items()}), folder / name)


def load(folder, name):
    return LOAD[name](folder / name) if LOAD[name] else open_policy(folder, None, CPU)


def message(folder, name):
    with pytest.raises(ValueError) as error:
        load(folder, name)
    text = str(error.value)
    assert text.startswith(f"{folder / name}: ") and "\n" not in text and len(text) <= 300
    return text


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", LOAD)
def test_numbers_that_are_none(weights, tmp_path, name, value):
    def spoil(state):
        key = [key for key, x in state.items() if x.ndim > 1 and ".1." in key][-1]
        state[key].view(-1)[-1] = value
        return state

    copy_with(weights, tmp_path, name, spoil)
    assert "holds NaN or infinity" in message(tmp_path, name)


@pytest.mark.parametrize("prefix", ["module.", "model.diffusion_model.", "pipe.dit.", "_orig_mod."])
@pytest.mark.parametrize("name", LOAD)
def test_prefixes_are_named(weights, tmp_path, name, prefix):
    count = []
    copy_with(weights, tmp_path, name, lambda state: count.append(len(state)) or {
        prefix + key: x for key, x in state.items()})
    text = message(tmp_path, name)
    assert f"its {count[0]} keys begin with {prefix!r}" in text and text.count(prefix) == 4  # and in three keys


@pytest.mark.parametrize("name", LOAD)
def test_other_keys_are_counted_and_three_shown(weights, tmp_path, name):
    copy_with(weights, tmp_path, name, lambda state: {key.replace("o", "oo"): x for key, x in state.items()})
    message(tmp_path, name)


def test_checkpoints_are_blamed_themselves(weights, tmp_path):
    state = load_file(weights / REDIRECTOR)
    save_file({f"_orig_mod.{key}": x for key, x in state.items()}, tmp_path / "prefix.safetensors")
    save_file(state | {"blocks.0.self_attn.q.bias": state["blocks.0.self_attn.q.bias"] * torch.nan},
              tmp_path / "nan.safetensors")
    toy = load_file(ROOT / "toy/weights/toy_base.safetensors")
    save_file({key: x for key, x in toy.items() if ".self_attn." in key}, tmp_path / "toy.safetensors")
    for name, why in (("prefix", "begin with '_orig_mod.'"), ("nan", "holds NaN"), ("toy", "keys do not fit a DiT of")):
        with pytest.raises(ValueError) as error:
            open_policy(weights, tmp_path / f"{name}.safetensors", CPU)
        text = str(error.value)
        assert text.startswith(f"{tmp_path / name}.safetensors: ") and why in text and len(text) - len(str(tmp_path)) < 300
