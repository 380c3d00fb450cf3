"""What prepare_data.py prints at its end: a summary, and a warning if no item has a picture."""

import numpy as np

from hanorec.data.protocol import Sequences
from hanorec.data.readers import Raw
from hanorec.data.tables import IMAGE_ENDINGS
from hanorec.run.files import printable


def summary(manifest: dict, data: Sequences, raw: Raw, encoded: str) -> list[str]:
    """Describe a data folder, a line for each topic.

    Args:
        manifest: the content of its manifest.json.
        encoded: a text about its encoding.
    """
    counts, options, lengths = manifest["counts"], manifest["options"], np.diff(data.start)
    dropped = {
        "below --min-rating": counts["below_min_rating"],
        "of items without a title": counts["of_untitled_items"],
        f"repeated (--repeats {options['repeats']})": counts["repeated_items_dropped"],
    }
    # Each count is of what the filters before it left
    dropped["of users with too few"] = counts["interactions_read"] - sum(dropped.values()) - counts["interactions"]
    few, pictures = counts["users_too_short"], counts["items"] - counts["items_without_image"]
    splits = [f"{counts[f'{name}_rows']} {name}" for name in ("train", "val", "test")]
    lines = {
        "from": f"{manifest['source']}: {', '.join(path.name for path in raw.files) or 'made up'}",
        "interactions": f"{counts['interactions']} of {counts['interactions_read']}",
        "left out": ", ".join(f"{count} {what}" for what, count in dropped.items() if count) or "none",
        "order": order_text(counts, options, raw),
        "users": f"{counts['users']}, with {lengths.min()} to {lengths.max()} interactions, {lengths.mean():.1f} on "
        f"average; left out with fewer than {options['min_interactions']} (--min-interactions): {few}",
        "items": items_text(counts, options),
        "pictures": f"{pictures} of {counts['items']} items",
        "examples": f"{', '.join(splits)} ({options['split']}), a target among {options['negatives']} "
        f"{options['negative_sampling']} negatives",
        "encoded": encoded,
    }
    return [f"  {name:<14}{text}" for name, text in lines.items()]


def order_text(counts: dict, options: dict, raw: Raw) -> str:
    """Say what the order of the interactions comes from."""
    if not raw.interactions.timed:
        return "that of the lines; the source has no times"
    tied = counts["interactions_tied_in_time"]
    rule = "shuffled by --seed" if options["ties"] == "shuffle" else "in the order of the file"
    return f"by time; {tied} have the time of another one, {rule}" if tied else "by time"


def items_text(counts: dict, options: dict) -> str:
    """Say how many items there are, and what became of those that no kept user touched."""
    if options["keep_untouched"]:
        return f"{counts['items']}, {counts['items_untouched']} of them without an interaction that counts"
    text = f"{counts['items']}; {counts['items_left_out']} without an interaction that counts are left out"
    return f"{text} (--keep-untouched keeps them)" if counts["items_left_out"] else str(counts["items"])


def picture_warning(data: Sequences, raw: Raw) -> str | None:
    """Return a warning if no item has a picture, else None."""
    if any(data.images):
        return None
    if raw.images:  # in the folder of the source; --images without a picture of an item is an error
        first = printable(min(path.name for path in raw.images.values()))
        fault = f"No picture has the id of an item. The first of {len(raw.images)} is {first}, the first item is "
        fault += f"{printable(data.item_ids[0])}. Rename the pictures to <item>.jpg"
    else:
        fault = f"Give their folder with --images DIR. A picture is named <item>{', '.join(IMAGE_ENDINGS)}"
    text = f"WARNING: none of the {len(data.item_ids)} items has a picture, so the models will see titles alone."
    line = "=" * 100
    return f"\n{line}\n{text}\n{fault}. Then prepare the data again.\n{line}"
