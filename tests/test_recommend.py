"""Recommend from end to end, small: for whom, from what, from data prepared later, and what is refused."""

import json
import shutil
import time

import numpy as np
import pytest
from conftest import draw_posters, movielens, words
from spoilt import changed
from stages import lines, refused

import prepare_data
from hanorec import recommend
from hanorec.data.folder import DataFolder
from hanorec.ranking import recommending, sasrec
from hanorec.ranking.settings import Settings
from hanorec.run.files import UserError
from hanorec.run.runs import read_run


def chosen(line):
    return [item["item"] for item in line["recommendations"]]


def whole(folder):
    """{user: all items} of a leave-one-out data folder, from the examples."""
    items = {line["user"]: line["items"] for line in lines(folder / "sequences.jsonl")}
    val = {line["user"]: line["target"] for line in lines(folder / "val.jsonl")}
    return {
        line["user"]: [*items[line["user"]], val[line["user"]], line["target"]] for line in lines(folder / "test.jsonl")
    }


def test_a_user_after_the_last_interaction(prepared, sft_run, capsys):
    """The history ends with the test target; nothing that the user has is recommended, unless --repeat."""
    user, history = next(iter(whole(prepared).items()))
    titles = {line["item"]: line["title"] for line in lines(prepared / "items.jsonl")}
    main_words = ["--run", str(sft_run), "--user", user, "--top-k", "100"]
    (line,) = recommend.main(main_words)
    assert [item["item"] for item in line["history"]] == history[-5:] and line["interactions"] == len(history)
    own = {titles[item] for item in history}
    assert {titles[item] for item in chosen(line)} == set(titles.values()) - own
    assert len(chosen(line)) == len(set(chosen(line))) == line["candidates"]
    scores = [item["score"] for item in line["recommendations"]]
    assert scores == sorted(scores, reverse=True)
    printed = capsys.readouterr().out
    assert "trained on an earlier" not in printed and f"after {len(history)} items" in printed
    assert f" 1. {titles[chosen(line)[0]]} ({chosen(line)[0]})" in printed
    (again,) = recommend.main([*main_words, "--repeat"])
    assert len(chosen(again)) == len(set(titles.values()))


def test_history_from_and_top_k(prepared, sft_run, tmp_path):
    """Anybody's history, candidates by ids or in a file, and the scores of one list as evaluate.py computes them."""
    ids = [line["item"] for line in lines(prepared / "items.jsonl")]
    common = ["--run", str(sft_run), "--history", f"{ids[30]},{ids[31]}"]
    (line,) = recommend.main([*common, "--from", f"{ids[40]},{ids[41]},{ids[30]},{ids[42]}", "--top-k", "2"])
    assert len(chosen(line)) == 2 and set(chosen(line)) < {ids[40], ids[41], ids[42]} and line["candidates"] == 3
    (tmp_path / "ids.txt").write_text(f"{ids[40]}\n{ids[41]}\n\n{ids[42]}\n")
    (other,) = recommend.main([*common, "--from", str(tmp_path / "ids.txt"), "--top-k", "2"])
    assert other == line
    assert recommend.recommend(sft_run, history=ids[30:32], among=ids[40:43], top_k=2) == [line]


def test_all_users_are_written_and_an_interrupted_file_is_continued(prepared, sft_run, tmp_path, monkeypatch):
    out, add, saved = tmp_path / "all.jsonl", recommending.Record.add, []

    def stop_after_two(record, new_lines):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(len(new_lines))
        add(record, new_lines)

    command = ["--run", str(sft_run), "--users", "all", "--out", str(out), "--top-k", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(recommending.Record, "add", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            recommend.main(command)
    assert not out.exists()
    ranked, line = [], recommending.Recommender.line
    monkeypatch.setattr(recommending.Recommender, "line", lambda self, *user: ranked.append(user) or line(self, *user))
    recommend.main(command)
    histories = lines(prepared / "histories.jsonl")
    assert len(ranked) == len(histories) - sum(saved) and sum(saved) == 16
    assert [line["user"] for line in lines(out)] == [history["user"] for history in histories]
    (one,) = recommend.main(["--run", str(sft_run), "--user", ranked[-1][0], "--top-k", "3"])
    assert one in lines(out) and not list(tmp_path.glob(".*.part"))


def test_a_complete_file_is_not_computed_again(prepared, sft_run, tmp_path, monkeypatch, capsys):
    """It is, once it was changed, or with another option."""
    out, ranked, line = tmp_path / "all.jsonl", [], recommending.Recommender.line
    monkeypatch.setattr(recommending.Recommender, "line", lambda self, *user: ranked.append(user) or line(self, *user))
    command = words("--run", sft_run, "--users", "all", "--out", out, "--top-k", 3)
    first = recommend.main(command)
    count, content = len(first), out.read_bytes()
    assert len(ranked) == count and "complete already" not in capsys.readouterr().out
    assert recommend.main(command) == first
    assert len(ranked) == count and f"{out} is complete already; delete it" in capsys.readouterr().out
    recommend.main([*command, "--repeat"])
    assert len(ranked) == 2 * count
    recommend.main(command)
    assert len(ranked) == 3 * count and out.read_bytes() == content
    out.write_text("{}\n")
    recommend.main(command)
    assert len(ranked) == 4 * count and out.read_bytes() == content


def test_1900_items_answer_in_seconds(sft_run, tmp_path, capsys):
    """With the first stage. The limit is wide, because other tests use the cores too."""
    users = [f"{n},p{(37 * n + 11 * step) % 1900},{step}" for n in range(300) for step in range(8)]
    (tmp_path / "orders.csv").write_text("\n".join(["user,item,timestamp", *users]) + "\n")
    titles = [f"p{number},Thing {number % 83} of {number % 97}" for number in range(1900)]
    (tmp_path / "products.csv").write_text("\n".join(["item,title", *titles]) + "\n")
    prepare_shop(tmp_path, tmp_path / "shop", sft_run, "--keep-untouched")
    began = time.monotonic()
    (line,) = recommend.main(words("--run", sft_run, "--data", tmp_path / "shop", "--user", 7))
    seconds = time.monotonic() - began
    assert line["candidates"] == 1892 and line["first_stage"].startswith("co-occurrence") and len(chosen(line)) == 10
    assert seconds < 20, seconds
    assert Settings().shortlist == 100


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A data folder of a shop whose customers have names, with its encoding of a run's model."""
    raw = tmp_path_factory.mktemp("named")
    users = ["Jana Brandt", "Ali Okoye", "ali okoye", *(f"User {number}" for number in range(9))]
    rows = [f"{user},p{(3 * n + 2 * step) % 30},{step}" for n, user in enumerate(users) for step in range(8)]
    (raw / "orders.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    titles = [f"p{number},Thing {'abcdefghij'[number % 10]} {number}" for number in range(30)]
    (raw / "products.csv").write_text("\n".join(["item,title", *titles]) + "\n")
    return raw


def prepare_shop(raw, out, model, *more, orders="orders.csv"):
    tables = ["--interactions", raw / orders, "--items", raw / "products.csv"]
    prepare_data.main(words("--dataset", "csv", *tables, "--model", model, "--out", out, *more))


def test_a_name_in_other_capitals_is_guessed_right(named, sft_run, tmp_path, capsys):
    prepare_shop(named, tmp_path / "shop", sft_run)
    command = words("--run", sft_run, "--data", tmp_path / "shop", "--top-k", 2, "--user")
    (right,) = recommend.main([*command, "Jana Brandt"])
    assert "is read as" not in capsys.readouterr().out
    for name in ("JANA BRANDT", "jana brandt", " Jana brandt "):
        assert recommend.main([*command, name]) == [right]
        assert f"{name} is read as Jana Brandt" in capsys.readouterr().out
    assert "did you mean Ali Okoye or ali okoye?" in refused(capsys, recommend.main, *command, "ALI OKOYE")
    (small,) = recommend.main([*command, "ali okoye"])
    assert small["user"] == "ali okoye"
    assert "did you mean Jana Brandt?" in refused(capsys, recommend.main, *command, "JANNA BRAND")


def test_old_orders_that_later_data_lack_are_a_warning(named, sft_run, tmp_path, capsys):
    """Compared with what the run's own data folder holds; a product that is gone cannot be recommended anyway."""
    run = tmp_path / "run"
    shutil.copytree(sft_run, run)
    prepare_shop(named, tmp_path / "shop", run)
    config = json.loads((run / "config.json").read_text())
    config["options"]["data"] = str(tmp_path / "shop")
    (run / "config.json").write_text(json.dumps(config))
    command = words("--run", run, "--data", tmp_path / "later", "--user", "Jana Brandt")
    orders = (named / "orders.csv").read_text().splitlines()
    (named / "later.csv").write_text("\n".join([*orders, "Jana Brandt,p15,99"]) + "\n")
    prepare_shop(named, tmp_path / "later", run, orders="later.csv")
    recommend.main(command)
    assert "WARNING" not in capsys.readouterr().out
    newest = [line for line in orders if line.split(",")[-1] not in "01" or not line.startswith(("Jana", "User 3"))]
    (named / "later.csv").write_text("\n".join([*newest, "Jana Brandt,p15,99"]) + "\n")
    prepare_shop(named, tmp_path / "later", run, orders="later.csv")
    (line,) = recommend.main(command)
    printed = capsys.readouterr().out
    assert "lacks orders that" in printed and "of 1 user (e.g. Jana Brandt: p0)" in printed
    assert "may be recommended what they have" in printed and printed.count("WARNING") == 1
    assert line["interactions"] == 7
    for others in (["--user", "ali okoye"], ["--history", "p15"]):
        recommend.main([*command[:-2], *others])
        assert "WARNING" not in capsys.readouterr().out
    recommend.main([*command[:-2], "--users", "all", "--out", str(tmp_path / "all.jsonl")])
    assert "of 2 users (e.g. Jana Brandt: p0)" in capsys.readouterr().out
    recommend.main(words("--run", run, "--user", "Jana Brandt"))
    assert "WARNING" not in capsys.readouterr().out  # the run's own data folder
    (tmp_path / "shop" / "manifest.json").unlink()
    recommend.main(command)
    assert "WARNING" not in capsys.readouterr().out  # nothing to compare with


def test_a_first_stage_chooses_from_a_large_catalogue(data, prepared, sft_run, monkeypatch, capsys):
    """Co-occurrence, or SASRec where it was trained on the data folder."""
    user = next(iter(whole(prepared)))
    common = ["--run", str(sft_run), "--data", str(data), "--user", user, "--top-k", "50"]
    with monkeypatch.context() as patch:
        patch.delattr(recommending, "first_stage")  # not built where the model ranks all
        recommend.main(common)
        assert "chosen by" not in capsys.readouterr().out
    (few,) = recommend.main([*common, "--shortlist", "12"])
    assert " candidates, chosen by co-occurrence and popularity, then ranked by log-li" in capsys.readouterr().out
    assert few["first_stage"].startswith("co-occurrence") and len(chosen(few)) == 12
    everything = DataFolder(data)
    histories = everything.histories()
    last = set(histories[user][0][-5:])
    counts = np.zeros(len(everything.items))
    for items, _ in histories.values():
        for item in items:
            counts[item] += len(last & set(items))
    smallest = min(counts[everything.items.index_of[item]] for item in chosen(few))
    own = {everything.items.titles[item] for item in histories[user][0]}
    left_out = [item for item, title in enumerate(everything.items.titles) if title not in own]
    left_out = [item for item in left_out if everything.items.ids[item] not in chosen(few)]
    assert smallest >= sorted(counts[left_out])[-2]  # one of two equal titles may stand for the other
    sasrec.main(["--data", str(data), "--epochs", "1", "--width", "8"])
    (by_sasrec,) = recommend.main([*common, "--shortlist", "12"])
    assert by_sasrec["first_stage"] == str(data / "sasrec") and len(chosen(by_sasrec)) == 12


def test_no_prompt_is_too_long(data, sft_run, tmp_path, capsys):
    """A run with a small --max-length ranks everything: in rounds, after a shorter history, and what never fits."""
    run = tmp_path / "short"
    shutil.copytree(sft_run, run)
    config = json.loads((run / "config.json").read_text())
    config["options"]["max_length"] = 120
    (run / "config.json").write_text(json.dumps(config))
    user = lines(data / "test.jsonl")[0]["user"]
    (line,) = recommend.main(words("--run", run, "--user", user, "--top-k", 60))
    assert len(chosen(line)) == line["candidates"]
    scores = [item["score"] for item in line["recommendations"]]
    known = [score for score in scores if score is not None]
    assert 2 <= len(known) < len(scores) and scores[: len(known)] == sorted(known, reverse=True)
    assert "histories were cut to the --max-length 120" in capsys.readouterr().out
    config["options"] |= {"max_length": 40, "tasks": ["yesno"]}
    (run / "config.json").write_text(json.dumps(config))
    (line,) = recommend.main(words("--run", run, "--user", user, "--top-k", 60))
    assert len(chosen(line)) == line["candidates"] and "Yes" in line["unit"]
    assert "are longer than the --max-length 40" in capsys.readouterr().out


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """The raw files of `prepared` with a new item, a new user of two interactions, and one more item of an old user."""
    raw = tmp_path_factory.mktemp("later") / "raw"
    movielens(raw, users=30)
    draw_posters(raw / "posters", items=range(100, 162))
    with open(raw / "movies.csv", "a", encoding="utf-8") as file:
        file.write('160,"Quite new, Xylophone (2024)",Drama\n161,"Unseen Zebra (2025)",Drama\n')
    with open(raw / "ratings.csv", "a", encoding="utf-8") as file:
        file.write("newcomer,110,5,2000\nnewcomer,160,5,2001\n1,160,5,2002\n")
    return raw


def test_later_data_with_an_earlier_run(later, sft_run, tmp_path, capsys):
    """New orders, users and items: refused with the tiny backbone's new tokenizer, and used after --model RUN."""
    folder = tmp_path / "later"
    argv = words("--dataset", "movielens", "--source", later, "--out", folder, "--keep-untouched")
    prepare_data.main([*argv, "--max-pixels", "3136"])
    command = words("--run", sft_run, "--data", folder, "--top-k", 80, "--user")
    error = refused(capsys, recommend.main, *command, "newcomer")
    assert f"prepare_data.py --out {folder} --encode-only --model {sft_run}" in error
    prepare_data.main(words("--out", folder, "--encode-only", "--model", sft_run))
    printed = capsys.readouterr().out
    assert "at most 3136 pixels" in printed  # as the run's own data
    assert f"next: python -m hanorec.recommend --run {sft_run} --data {folder} --users all" in printed
    (line,) = recommend.main([*command, "newcomer"])
    printed = capsys.readouterr().out
    assert printed.count("was trained on an earlier data folder") == 1
    assert [item["item"] for item in line["history"]] == ["110", "160"]
    assert "161" in chosen(line) and not {"110", "160"} & set(chosen(line))  # one that nobody has
    (line,) = recommend.main([*command, "newcomer", "--shortlist", "20"])
    assert len(chosen(line)) == 20 and "161" in chosen(line) and line["first_stage"].startswith("co-occurrence")
    (line,) = recommend.main([*command, "1"])
    assert line["history"][-1]["item"] == "160" and "160" not in chosen(line)


def test_image_tokens_of_another_vision_tower_are_refused(prepared, sft_run, tmp_path, capsys):
    """The same titles give the same tokenizer, but another --seed gives other weights."""
    options = read_run(sft_run)["options"]
    raw = prepared.parent / "raw"
    argv = words("--dataset", "movielens", "--source", raw, "--max-pixels", 3136, "--seed", 7, "--out", tmp_path / "b")
    prepare_data.main(argv)
    user = lines(prepared / "test.jsonl")[0]["user"]
    assert options["model"] == "tiny"
    error = refused(capsys, recommend.main, "--run", sft_run, "--data", tmp_path / "b", "--user", user)
    assert "made by another vision tower" in error and f"--model {sft_run}" in error


def test_old_data_folders_and_adapters(data, prepared, sft_run, lora_run, tmp_path, capsys):
    """A folder without histories.jsonl gives the same history. An adapter on the tiny backbone stays with its data."""
    user, history = next(iter(whole(prepared).items()))
    (data / "histories.jsonl").unlink()
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["files"]["histories.jsonl"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    (line,) = recommend.main(words("--run", sft_run, "--data", data, "--user", user))
    assert [item["item"] for item in line["history"]] == history[-5:]
    assert "was prepared by an earlier version" in capsys.readouterr().out
    (line,) = recommend.main(words("--run", lora_run, "--user", user))
    assert len(chosen(line)) == 10
    manifest["files"]["train.jsonl"] = "0"
    (data / "manifest.json").write_text(json.dumps(manifest))
    error = refused(capsys, recommend.main, "--run", lora_run, "--data", data, "--user", user)
    assert "adapter on the tiny backbone" in error and "--tune full" in error
    error = refused(capsys, prepare_data.main, "--out", data, "--encode-only", "--model", lora_run)
    assert "adapter on the tiny backbone" in error


def test_a_dpo_run_recommends(prepared, dpo_run):
    user = lines(prepared / "test.jsonl")[0]["user"]
    (line,) = recommend.main(words("--run", dpo_run, "--user", user, "--top-k", 3))
    assert len(chosen(line)) == 3 and line["unit"].startswith("log-likelihood")


def test_what_is_refused(prepared, sft_run, tmp_path, capsys):
    titles = {line["title"]: line["item"] for line in lines(prepared / "items.jsonl")}
    title, item = next(iter(titles.items()))
    user = lines(prepared / "test.jsonl")[0]["user"]
    for given, message in [
        (["--user", f"{user}0000"], f"user {user}0000 has no item of"),
        (["--history", f"{item},nothing"], "--history: nothing is not in"),
        (["--history", title.replace(",", "")], "is not in"),
        (["--history", ","], "--history holds no item"),
        (["--user", user, "--from", "101 "], None),
        (["--user", user, "--from", "Film"], "--from: Film is not in"),
        (["--user", user, "--data", tmp_path / "none"], "does not exist; give --data DIR"),
        (["--user", user, "--users", "all"], "give one of --user ID, --users all and --history"),
        ([], "give one of --user ID, --users all and --history"),
        (["--users", "all"], "--users all needs --out FILE"),
        (["--users", "all", "--out", "all.csv"], "name it all.jsonl"),
        (["--users", "all", "--out", "all.XLS"], "name it all.jsonl"),
        (["--users", "all", "--out", "all.parquet"], "name it all.jsonl"),
        (["--users", "all", "--out", tmp_path], f"{tmp_path} is a folder; give the file to write"),
    ]:
        if message:
            assert message in refused(capsys, recommend.main, "--run", sft_run, *given), given
    with pytest.raises(UserError, match="is a folder; give the file"):
        recommend.recommend(sft_run, [user], out=tmp_path)
    assert "give --run RUN" in refused(capsys, recommend.main, "--user", user)
    assert "it contains" in refused(capsys, recommend.main, "--run", sft_run.parent, "--user", user)


def test_spoilt_histories_are_refused(data, sft_run, capsys):
    command = ["--run", sft_run, "--data", data, "--history", lines(data / "items.jsonl")[0]["item"]]
    for field, value, message in [
        ("items", [], "has an empty history"),
        ("others", ["nothing"], "'nothing' is not in items.jsonl"),
        ("items", "text", "'items' cannot be"),
    ]:
        before = (data / "histories.jsonl").read_bytes()
        changed("histories.jsonl", lambda line, field=field, value=value: line | {field: value})(data)
        assert message in refused(capsys, recommend.main, *command)
        (data / "histories.jsonl").write_bytes(before)


def test_a_run_of_mllm_srec_is_refused(prepared, sft_run, tmp_path, capsys):
    """Its texts are written for examples, not for histories after the last interaction."""
    shutil.copytree(sft_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["options"]["summaries"] = "tiny"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    user = lines(prepared / "test.jsonl")[0]["user"]
    error = refused(capsys, recommend.main, "--run", tmp_path / "run", "--user", user)
    assert "texts of MLLM-SRec, which are written for examples only; give a run of --prompt plain" in error


def test_a_run_of_other_prompts_is_refused(prepared, sft_run, tmp_path, capsys):
    shutil.copytree(sft_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"prompts": "of other texts"}))
    user = lines(prepared / "test.jsonl")[0]["user"]
    error = refused(capsys, recommend.main, "--run", tmp_path / "run", "--user", user)
    assert "was trained on other prompts than those of today" in error
