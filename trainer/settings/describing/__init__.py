"""What options are in words: `siftclip explain`, the lists in help texts, the tables in docs."""
