"""The samples of tars: their places, their uids, and what is bad of them."""
