from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_hf import Datastore, KNNLMForCausalLM
from knnlm_hf.demo.texts import reference, split

model = AutoModelForCausalLM.from_pretrained("gpt2").eval()
tokenizer = AutoTokenizer.from_pretrained("gpt2")
train, valid, test = split(reference()[30:60])  # three lists of texts; put yours here
store = Datastore.build(model, train, "stores/mine", tokenizer=tokenizer)
knn = KNNLMForCausalLM(model, store)
