"""Questions with an answer that is known or calculated: `python bench/ toy | mi | variance | curve | scale`."""
