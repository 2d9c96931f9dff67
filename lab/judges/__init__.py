"""Networks that judge generated pictures: open_clip, a detector, feature networks, and distances over them."""
