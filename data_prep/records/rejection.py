"""Why a row is not written: one word each, as it stands in `quarantine.jsonl`."""

REASONS: dict[str, str] = {
    "not_utf8": "The line is not UTF-8, or its text holds half of a surrogate pair.",
    "not_json": "The line is not JSON; an empty line is none either.",
    "not_an_object": "The line is JSON but not an object.",
    "broken_row": "A field is missing or has the wrong type, or the turns do not alternate human, gpt.",
    "video": "The row has a video; only pictures are read.",
    "no_answer": "The conversation has no gpt turn, or ends with a question.",
    "empty_answer": "An answer is empty or only white space.",
    "duplicate": "The same line stands earlier in the same set.",
    "missing_image": "A picture's file does not exist.",
    "path_outside_root": "A picture's path leads out of the set's root, by itself or through a link.",
    "not_a_file": "A picture's path is a folder or a device.",
    "unreadable_image": "A picture's file may not be read.",
    "picture_format": "A picture is neither JPEG, PNG nor WebP.",
    "undecodable_image": "A picture is truncated or broken.",
    "too_many_pixels": "A picture has more pixels than shard.max_pixels.",
    "image_count": "The conversation has more or fewer <image> marks than the row has pictures.",
    "over_budget": "Text and tiles take more tokens than shard.max_tokens.",
    "straddles_split": "The row's pictures fall on two sides, or stand on another side elsewhere.",
}


class Rejected(Exception):
    """A row that goes to quarantine: `reason` is a word of REASONS, `message` says it of this row."""

    def __init__(self, reason: str, message: str):
        assert reason in REASONS, reason
        super().__init__(reason, message)
        self.reason, self.message = reason, message
