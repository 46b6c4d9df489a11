"""Oriented object detection in aerial images: DOTA's layout and metrics, tiles, and a rendered stand-in."""
