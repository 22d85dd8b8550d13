"""What a file of kept JSON may hold after a full disk, a damaged one, or another version."""

OTHER_JSON = ['{"a', "", "null", "[]", "{}", "3", '"a"', "[[1]]", '{"a": null}', "[" * 9999]
