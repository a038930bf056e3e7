package contract_test

import (
	"encoding/json"
	"testing"

	"github.com/openlock/openlock/internal/contract"
)

func TestOpenLockIsInTheContract(t *testing.T) {
	var document struct {
		OpenAPI string
		Paths   map[string]map[string]struct{ OperationID string }
	}
	if err := json.Unmarshal(contract.OpenAPI, &document); err != nil {
		t.Fatal(err)
	}
	if document.OpenAPI != "3.1.0" {
		t.Errorf("openapi is %q, want 3.1.0", document.OpenAPI)
	}
	if got := document.Paths["/locks/{id}/OpenLock"]["post"].OperationID; got != "post_OpenLockRoute" {
		t.Errorf("POST /locks/{id}/OpenLock has operationId %q", got)
	}
}

func TestEveryEventSchemaIsClosed(t *testing.T) {
	var schemas map[string]struct{ AdditionalProperties *bool }
	if err := json.Unmarshal(contract.Events, &schemas); err != nil {
		t.Fatal(err)
	}
	if _, ok := schemas["LockOpenRequested"]; !ok {
		t.Error("LockOpenRequested has no schema")
	}
	for eventType, schema := range schemas {
		if schema.AdditionalProperties == nil || *schema.AdditionalProperties {
			t.Errorf("%s lets unknown fields through", eventType)
		}
	}
}
