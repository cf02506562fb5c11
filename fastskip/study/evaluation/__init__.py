"""Judge models and policies by their answers to items.

`items` and `item_inputs` are the questions, from files to model inputs; `metrics` and `captions`
score an answer. In an `exam` a model answers all items; `answers` holds what it scored. `judging`
compares the policies of one model (with `agreement`, its dense answers repeated, and
`smaller_images`, the cheapest baseline), `comparison` compares models, and `result` is the file.
"""
