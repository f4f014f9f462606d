"""A decoupled Triton model that does what its prompt says, well or badly, over the project's tensors.

text_input is a JSON object with any of
    words           list: what to stream, one response each (default: none)
    count           int: stream this many words w0, w1, ... instead
    delay_ms        float: pause before each response
    error           [code, message]: fail like this after the words
    end             "finish": finish_reason and final flag (default); "separate": an empty final response
                    after the finish; "no_final": finish_reason but never the final flag;
                    "sudden": final flag without a finish_reason
    report          true: answer with a JSON list of the ids of the requests seen cancelled
    python          true: answer with a JSON list of the interpreter's version and prefix
    echo            true: answer with a JSON object of the request's tensors, as without text_input
Any other text is streamed back word by word. max_tokens bounds the number of words. With stream=false
the words are one response.

The parameter start_up of config.pbtxt makes the model itself bad: "fail" and "hang" while it is loaded,
"refuse" at every request, "once" after the first one, by no longer answering.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from trtforge import wire

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def _plain(tensor):
    values = [v.decode() if isinstance(v, bytes) else v.item() for v in tensor.as_numpy().reshape(-1)]
    return values[0] if len(values) == 1 else values


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.start_up = parameters.get("start_up", {}).get("string_value", "")
        if self.start_up == "fail":
            raise RuntimeError("the weights are made of cheese")
        if self.start_up == "hang":
            time.sleep(3600)
        self.cancelled = []
        self.num_requests = 0

    def execute(self, requests):
        for request in requests:
            self.num_requests += 1
            if self.start_up == "once" and self.num_requests > 1:
                self.unanswered = request.get_response_sender()
                continue
            tensors = {tensor.name(): _plain(tensor) for tensor in request.inputs()}
            arguments = (request.request_id(), tensors, request.get_response_sender())
            threading.Thread(target=self._answer, args=arguments, daemon=True).start()

    def _words(self, script, tensors):
        if "echo" in script:
            return [json.dumps(tensors)]
        if "python" in script:
            return [json.dumps([sys.version, sys.prefix])]
        if "report" in script:
            return [json.dumps(self.cancelled)]
        return script.get("words", []) or [f"w{i} " for i in range(script.get("count", 0))]

    def _answer(self, request_id, tensors, sender):
        text = tensors.get("text_input", '{"echo": true}')
        script = json.loads(text) if text.startswith("{") else {"words": [f"{w} " for w in text.split()]}
        if self.start_up == "refuse":
            script = {"error": ["INTERNAL", "no answer before tea"]}
        words = self._words(script, tensors)
        finish = "stop" if len(words) <= tensors.get("max_tokens", 1 << 30) else "length"
        words = words[: tensors.get("max_tokens")]
        end = script.get("end", "finish")
        parts = words if tensors.get("stream") and words else ["".join(words)]
        finishes = "error" not in script and end != "sudden"
        for position, part in enumerate(parts):
            reason = finish if finishes and position == len(parts) - 1 else None
            time.sleep(script.get("delay_ms", 0) / 1000)
            if sender.is_cancelled():
                self.cancelled.append(request_id)
                script["error"] = ["CANCELLED", "the client has cancelled the request"]
                break
            response = self._response(part, position + 1, reason)
            sender.send(response, flags=FINAL if reason and end == "finish" else 0)
        if "error" in script:
            code, message = script["error"]
            status = getattr(pb_utils.TritonError, code, pb_utils.TritonError.UNAVAILABLE)
            error = pb_utils.TritonError(wire.error_text(code, message), status)
            sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
        elif end in ("separate", "sudden"):
            sender.send(flags=FINAL)

    def _response(self, text, num_output_tokens, reason):
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("text_output", np.array([text.encode()], np.object_)),
                pb_utils.Tensor("output_ids", np.array([num_output_tokens], np.int32)),
                pb_utils.Tensor("finish_reason", np.array([(reason or "").encode()], np.object_)),
                pb_utils.Tensor("num_input_tokens", np.array([3], np.int32)),
                pb_utils.Tensor("num_output_tokens", np.array([num_output_tokens], np.int32)),
            ]
        )
