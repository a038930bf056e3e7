package contracttest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/pb33f/jsonschema/v6"
)

// errorBodySchema is the one error body of every JSON endpoint. It satisfies
// each of the shapes that the contract documents at once, so a client written
// for any of them works with all. That each code equals the status is checked
// beside it.
const errorBodySchema = `{
	"type": "object",
	"required": ["success", "error", "message", "code", "errors"],
	"properties": {
		"success": {"const": false},
		"error":   {"type": "string", "minLength": 1},
		"message": {"type": "string", "minLength": 1},
		"code":    {"type": "integer"},
		"errors": {
			"type": "array",
			"minItems": 1,
			"items": {
				"type": "object",
				"required": ["code", "message"],
				"properties": {
					"code":    {"type": "integer"},
					"message": {"type": "string", "minLength": 1}
				}
			}
		}
	}
}`

func compileErrorBody() (*jsonschema.Schema, error) {
	schema, err := jsonschema.UnmarshalJSON(strings.NewReader(errorBodySchema))
	if err != nil {
		return nil, err
	}
	return compile("error", schema)
}

func (r *rules) errorViolations(resp *http.Response, body []byte) []string {
	if !isJSON(resp.Header) {
		return []string{fmt.Sprintf("an error must be application/json, not %q", resp.Header.Get("Content-Type"))}
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err != nil {
		return []string{"the error body is not JSON: " + err.Error()}
	}
	if wrong := schemaViolations("error body", r.errorBody.Validate(value)); wrong != nil {
		return wrong
	}
	return codeViolations(resp.StatusCode, body)
}

// codeViolations reads a body that has the right shape.
func codeViolations(status int, body []byte) []string {
	var answer struct {
		Code   json.Number
		Errors []struct{ Code json.Number }
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return []string{"error body: " + err.Error()}
	}
	want := json.Number(fmt.Sprint(status))
	var wrong []string
	if answer.Code != want {
		wrong = append(wrong, fmt.Sprintf("error body: code is %s, the status %d", answer.Code, status))
	}
	for i, e := range answer.Errors {
		if e.Code != want {
			wrong = append(wrong, fmt.Sprintf("error body: errors[%d].code is %s, the status %d", i, e.Code, status))
		}
	}
	return wrong
}
