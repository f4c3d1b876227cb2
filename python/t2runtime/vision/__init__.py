"""Models that see: an image classifier and a small vision-language model, adapted by experts.

python -m t2runtime.vision digits --data FOLDER --out FOLDER
python -m t2runtime.vision vqa --data FOLDER --out FOLDER
"""
