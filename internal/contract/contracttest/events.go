package contracttest

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/pb33f/jsonschema/v6"
)

const eventsRoute = "/locks/{id}/events"

// outcomes are the events that the log keeps beyond the contract: what became
// of a command. They are read back from the events of a lock, but no command
// answers with one.
var outcomes = map[string]bool{
	"LockOpened":       true,
	"LockOpenRefused":  true,
	"LockOpenFailed":   true,
	"LockOpenExpired":  true,
	"OpenReportedLate": true,
}

func compileEvents(file []byte) (map[string]*jsonschema.Schema, error) {
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(file))
	if err != nil {
		return nil, err
	}
	byType, ok := value.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("events: want an object of schemas, got %T", value)
	}
	compiled := make(map[string]*jsonschema.Schema, len(byType))
	for eventType, schema := range byType {
		if compiled[eventType], err = compile(eventType, schema); err != nil {
			return nil, err
		}
	}
	return compiled, nil
}

func compile(name string, schema any) (*jsonschema.Schema, error) {
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource(name, schema); err != nil {
		return nil, err
	}
	return compiler.Compile(name)
}

// eventViolations looks for domain events in an answer that succeeded, and
// holds their payloads against the schema of their type. The OpenAPI document
// alone would let an unknown field of a payload through.
func (r *rules) eventViolations(path string, body []byte) []string {
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err != nil {
		return nil // a page, or a body that the OpenAPI check has refused
	}
	answer, _ := value.(map[string]any)
	if path == eventsRoute {
		return r.historyViolations(answer)
	}
	event, ok := answer["event"].(map[string]any)
	if !ok {
		return nil
	}
	return r.payloadViolations("event.data", event["type"], event["data"])
}

func (r *rules) historyViolations(answer map[string]any) []string {
	items, _ := answer["events"].([]any)
	var wrong []string
	for i, item := range items {
		fields, _ := item.(map[string]any)
		if eventType, _ := fields["type"].(string); outcomes[eventType] {
			continue
		}
		where := fmt.Sprintf("events[%d].event", i)
		wrong = append(wrong, r.payloadViolations(where, fields["type"], fields["event"])...)
	}
	return wrong
}

func (r *rules) payloadViolations(where string, eventType, payload any) []string {
	name, _ := eventType.(string)
	schema, ok := r.events[name]
	if !ok {
		return []string{fmt.Sprintf("%s: %v is not an event type that may stand here", where, eventType)}
	}
	return schemaViolations(where+" of "+name, schema.Validate(payload))
}

// schemaViolations makes one line of each complaint in err.
func schemaViolations(where string, err error) []string {
	if err == nil {
		return nil
	}
	// The first line names the schema's made-up location: of no use to a reader.
	_, details, _ := strings.Cut(err.Error(), "\n")
	var wrong []string
	for line := range strings.Lines(details) {
		wrong = append(wrong, where+": "+strings.TrimLeft(strings.TrimSpace(line), "- "))
	}
	return wrong
}
