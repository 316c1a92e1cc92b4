"""BERT with a head on the mean of its last states, as a class that transformers' AutoModelForSequenceClassification knows.

BertForSequenceClassification reads the first token through a pooler. Sentence encoders such as MiniLM were trained on the mean
over all tokens, and that pooler was not trained with them. Importing this module makes the class known.
"""
from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["MeanPooledBertConfig", "MeanPooledBertForSequenceClassification"]


class MeanPooledBertConfig(BertConfig):
    model_type = "mean_pooled_bert"


class MeanPooledBertForSequenceClassification(BertPreTrainedModel):
    """w^T mean_t h_t + b over the tokens that are no padding."""
    config_class = MeanPooledBertConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, output_hidden_states=None, **rest):
        attend = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        body = self.bert(input_ids, attention_mask=attend, output_hidden_states=output_hidden_states)
        states = body.last_hidden_state
        real = attend.unsqueeze(-1).to(states.dtype)
        mean = (states * real).sum(1) / real.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean), hidden_states=body.hidden_states)


AutoConfig.register(MeanPooledBertConfig.model_type, MeanPooledBertConfig)
AutoModelForSequenceClassification.register(MeanPooledBertConfig, MeanPooledBertForSequenceClassification)
