"""The encoding of a data folder, and what identifies its backbone."""

from functools import partial

from hanorec.model import encoding


def test_a_backbones_weights_are_identified(tmp_path, monkeypatch):
    """A folder's files by names, sizes and times. A hub name's files by their hashes in the hub's cache."""
    (tmp_path / "model.safetensors").write_text("weights")
    stat = (tmp_path / "model.safetensors").stat()
    assert encoding.backbone_weights(tmp_path) == [("model.safetensors", 7, stat.st_mtime_ns)]
    cache = tmp_path / "models--org--backbone"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(encoding, "cached_file", partial(encoding.cached_file, cache_dir=str(tmp_path)))
    for commit, weights in (("c1", "hash1"), ("c2", "hash2")):
        snapshot = cache / "snapshots" / commit
        for folder in (cache / "refs", cache / "blobs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (cache / "refs" / "main").write_text(commit)
        for name, blob in (("config.json", f"config{commit}"), ("model.safetensors", weights)):
            (cache / "blobs" / blob).write_text("{}")
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
        assert encoding.backbone_weights("org/backbone") == [("model.safetensors", weights)]
