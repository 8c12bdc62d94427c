"""Previews by a small decoder of Wan 2.1 latents: which file, which frames, what they may cost, and what else is shown.

The released weights are not here: the tests write random ones of ComfyUI's own class, with its names and shapes.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import torch

from .conftest import ON_CPU

FIRST, OLD = "taew2_1.safetensors", "lighttaew2_1.safetensors"


@pytest.fixture
def folder(comfy, tmp_path, monkeypatch):
    """models/vae_approx of this test, with the preview method taesd."""
    import folder_paths
    from comfy.cli_args import LatentPreviewMethod, args

    kinds = {".safetensors", ".pth"}
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], kinds))
    folder_paths.filename_list_cache.pop("vae_approx", None)
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.TAESD)
    comfy.node("tiny_decoder").say_once.cache_clear()
    return tmp_path


def weights(seed: int) -> dict[str, torch.Tensor]:
    from comfy.taesd.taehv import TAEHV

    torch.manual_seed(seed)
    values = TAEHV(latent_channels=16).state_dict()
    # ComfyUI's layers come without initial weights.
    for weight in values.values():
        weight.normal_(0, (2 / weight[0].numel()) ** 0.5) if weight.ndim > 1 else weight.fill_(0.5)
    # As taew2_1 is released.
    return {name: weight.half() for name, weight in values.items()}


def write(path, values) -> None:
    from safetensors.torch import save_file

    torch.save(values, path) if path.suffix == ".pth" else save_file(values, path)


def previewer(comfy, form=None):
    form = form or comfy.node("comfy_latents").LongCatLatents()
    return comfy.node("tiny_decoder").find_previewer(device(), form)


def device() -> torch.device:
    from comfy import model_management

    return model_management.get_torch_device()


def picture(values, latents):
    """The last frame of `latents` by ComfyUI's class itself, on the CPU."""
    from comfy.taesd.taehv import TAEHV

    network = TAEHV(latent_channels=16)
    network.load_state_dict({name: value.float() for name, value in values.items()})
    return (255 * network.decode(latents.cpu())[0, :, -1].movedim(0, -1).clamp(0, 1)).byte().numpy()


def same(shown, wanted) -> bool:
    # Where a GPU multiplies, a level may fall the other way.
    return np.abs(shown.astype(int) - wanted).max() <= (0 if ON_CPU else 1)


def shown(previewer, latents):
    return np.asarray(previewer.decode_latent_to_preview_image("JPEG", latents)[1])


@torch.inference_mode()
@pytest.mark.parametrize("name", [FIRST, "taew2_1.pth"])
def test_the_decoder_shows_the_generated_frames_with_their_past(comfy, folder, monkeypatch, name):
    values = weights(0)
    write(folder / name, values)
    monkeypatch.setattr(comfy.node("previews"), "SHARE", 1e9)
    monkeypatch.setattr(comfy.node("previews"), "LONGEST", 1e9)
    form = comfy.node("comfy_latents").LongCatLatents()
    film = comfy.node("previews").Film(previewer(comfy), form, 1, comfy.node("progress").NodeProgress())
    x0 = torch.randn(1, 16, 5, 4, 6).to(device())
    pictures = [np.asarray(film.expose(x0)[1]) for _ in range(4)]
    assert pictures[0].shape == (32, 48, 3) and pictures[0].std() > 5
    for frame, given in enumerate(pictures, start=1):
        assert same(given, picture(values, x0[:, :, max(frame - 2, 0) : frame + 1])), frame
    assert not same(pictures[3], picture(values, x0[:, :, 4:5])), "without its past it looks otherwise"


@torch.inference_mode()
def test_which_file_and_which_latents_it_takes(comfy, folder):
    """lighttaew2_1 was trained on the latents of the VAE, taew2_1 on normalized ones, and comes first."""
    old, new = weights(1), weights(2)
    form, x0 = comfy.node("comfy_latents").LongCatLatents(), torch.randn(1, 16, 1, 4, 6).to(device())
    write(folder / OLD, old)
    assert same(shown(previewer(comfy), x0), picture(old, form.process_out(x0)))
    write(folder / FIRST, new)
    import folder_paths

    folder_paths.filename_list_cache.pop("vae_approx", None)
    assert same(shown(previewer(comfy), x0), picture(new, x0))
    # LongCat-nano has a VAE of its own, whose latents this decoder does not know.
    import latent_preview

    nano = previewer(comfy, comfy.node("comfy_latents").NanoLatents())
    assert isinstance(nano, latent_preview.Latent2RGBPreviewer)


@pytest.mark.parametrize("method", ["NoPreviews", "Auto", "Latent2RGB", "TAESD"])
def test_comfyuis_preview_method_decides(comfy, folder, monkeypatch, method):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    write(folder / FIRST, weights(0))
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod[method])
    found, tiny = previewer(comfy), comfy.node("tiny_decoder").TinyPreviewer
    factors = latent_preview.Latent2RGBPreviewer
    kinds = {"NoPreviews": type(None), "Auto": factors, "Latent2RGB": factors, "TAESD": tiny}
    assert type(found) is kinds[method]


def _cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def _other_shape(path):
    write(path, weights(0) | {"decoder.1.weight": torch.zeros(256, 48, 3, 3)})


def _foreign(path):
    write(path, {"taesd_decoder.1.weight": torch.zeros(4)})


def _not_finite(path):
    write(path, weights(0) | {"decoder.1.bias": torch.full((256,), float("nan"))})


@pytest.mark.parametrize("spoil", [_cut, _other_shape, _foreign, _not_finite])
def test_a_file_that_is_no_decoder_falls_back_with_one_note(comfy, folder, caplog, spoil):
    import latent_preview

    write(folder / FIRST, weights(0))
    spoil(folder / FIRST)
    with caplog.at_level(logging.WARNING):
        found = [previewer(comfy) for _ in range(3)]
    assert all(isinstance(one, latent_preview.Latent2RGBPreviewer) for one in found)
    notes = [record.getMessage() for record in caplog.records if "previews" in record.getMessage()]
    assert len(notes) == 1 and FIRST in notes[0] and "replace" in notes[0]


def test_the_other_file_is_used_where_the_first_is_damaged(comfy, folder):
    write(folder / OLD, weights(1))
    (folder / FIRST).write_bytes(b"not a file of tensors")
    assert previewer(comfy).raw


@torch.inference_mode()
def test_a_device_without_memory_falls_back_in_the_midst_of_a_run(comfy, folder, caplog, monkeypatch):
    from comfy import model_management

    write(folder / FIRST, weights(0))
    form = comfy.node("comfy_latents").LongCatLatents()
    film = comfy.node("previews").Film(previewer(comfy), form, 0, comfy.node("progress").NodeProgress())
    x0 = torch.randn(1, 16, 3, 4, 6).to(device())
    assert film.expose(x0)[1].size == (48, 32)
    monkeypatch.setattr(model_management, "get_free_memory", lambda device: 1000)
    monkeypatch.setattr(comfy.node("previews"), "SHARE", 1e9)
    monkeypatch.setattr(comfy.node("previews"), "LONGEST", 1e9)
    with caplog.at_level(logging.WARNING):
        assert film.expose(x0)[1].size == film.expose(x0)[1].size == (6, 4)
    assert sum("memory" in record.getMessage() for record in caplog.records) == 1


@torch.inference_mode()
def test_pictures_wait_until_the_run_can_pay_for_them(comfy, folder, monkeypatch):
    """By a clock of the test: steps of 1 s and pictures of 0.1 s; 3 % of the time pay for one picture in 3.3 s."""
    module, tiny = comfy.node("previews"), comfy.node("tiny_decoder").TinyPreviewer
    write(folder / FIRST, weights(0))
    now, made = [0.0], []

    def decode(self, form, x0):
        now[0] += 0.1
        made.append(now[0])
        return form, None, None

    monkeypatch.setattr(tiny, "decode_latent_to_preview_image", decode)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    form = comfy.node("comfy_latents").LongCatLatents()
    film = module.Film(previewer(comfy), form, 0, comfy.node("progress").NodeProgress())
    for _ in range(100):
        now[0] += 1
        assert film.expose(torch.zeros(1, 16, 24, 2, 2)) is not None, "a step without a new picture shows the last ones"
    assert 28 <= len(made) <= 1 + 0.03 * now[0] / 0.1


def test_a_sampler_sends_its_pictures_and_lets_it_go(comfy, model, sample, image_latent, folder, monkeypatch):
    import gc
    import weakref

    from comfy import utils

    write(folder / FIRST, weights(0))
    # As if these latents were Wan 2.1's.
    monkeypatch.setattr(model.model.latent_format, "taesd_decoder_name", "lighttaew2_1")
    tiny, found, sent = comfy.node("tiny_decoder"), [], []
    make = tiny.find_previewer

    def find(*given):
        made = make(*given)
        found.append(weakref.ref(made))
        assert isinstance(made, tiny.TinyPreviewer)
        return made

    monkeypatch.setattr(comfy.node("previews"), "find_previewer", find)
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: sent.append(preview))
    plain = sample(image_latent, steps=3)
    assert [one[1].size for one in sent] == [(96, 64)] * 3, "eight pixels for each of the latent"
    gc.collect()
    assert [one() for one in found] == [None], "the decoder is freed with the run"
    monkeypatch.undo()
    assert torch.equal(sample(image_latent, steps=3), plain), "previews leave the video as it is"
