package shadow_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/shadow"
)

// Whatever a stranger publishes: no panic, every refusal an *Error, and what is accepted
// keeps the limits and survives its durable form.
func FuzzParseUpdate(f *testing.F) {
	for _, seed := range []string{
		`{"state":{"desired":{"open":["id",1,2]},"reported":{"a":{"b":1.0}}},"clientToken":"t","version":1}`,
		`{"state":{"desired":null,"reported":{"a":{"b":null},"c":[{"d":[]},{}]}},"thingName":"door"}`,
		`{"state":{"reported":{"":"\u00e9\ud83d\ude00","n":-0.10e+400}}}`,
		`{"state":{"desired":{"a":[null]}}}`,
		`{"state":{"desired":{"a":{},"a":{}}}}`,
		"{\"state\":{\"desired\":{\"a\":\"\xff\"}}}",
		`{"state":`, `null`, `[]`, ``,
	} {
		f.Add([]byte(seed))
	}
	now := time.Unix(1700000000, 0)
	var empty shadow.Document
	before, err := empty.Apply(shadow.Set("reported", map[string]any{"a": map[string]any{"b": 1, "c": []int{1}}}), now)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		u, err := shadow.ParseUpdate(payload)
		if err != nil {
			mustRefuse(t, err)
			return
		}
		after, err := before.Apply(u, now)
		if err != nil {
			mustRefuse(t, err)
			return
		}
		mustKeepLimits(t, after)
		mustSurvive(t, after)
		mustBeJSON(t, shadow.UpdateAccepted(u, after, now))
		mustBeJSON(t, shadow.Documents(before, after, u.ClientToken, now))
		if body, ok := after.Delta(u.ClientToken, now); ok {
			mustBeJSON(t, body)
		}
	})
}

func mustRefuse(t testing.TB, err error) {
	t.Helper()
	var refusal *shadow.Error
	if !errors.As(err, &refusal) {
		t.Fatalf("refused with %T: %v", err, err)
	}
	mustBeJSON(t, refusal.Rejected(time.Unix(0, 0)))
}

// Limits: 8192 bytes, eight levels below a section, and no null anywhere.
func mustKeepLimits(t testing.TB, d shadow.Document) {
	t.Helper()
	var stored struct {
		State map[string]json.RawMessage `json:"state"`
	}
	if err := json.Unmarshal(d.Encode(), &stored); err != nil {
		t.Fatal(err)
	}
	size := 0
	for _, raw := range stored.State {
		size += len(raw)
		var v any
		dec := json.NewDecoder(bytes.NewReader(raw))
		dec.UseNumber()
		if err := dec.Decode(&v); err != nil {
			t.Fatal(err)
		}
		if levels(t, v) > 1+shadow.MaxDepth {
			t.Fatalf("too deep: %s", raw)
		}
	}
	if size > shadow.MaxDocument {
		t.Fatalf("%d bytes", size)
	}
}

func levels(t testing.TB, v any) int {
	deepest := 0
	switch v := v.(type) {
	case map[string]any:
		for _, below := range v {
			deepest = max(deepest, levels(t, below))
		}
		return deepest + 1
	case []any:
		for _, below := range v {
			deepest = max(deepest, levels(t, below))
		}
		return deepest + 1
	case nil:
		t.Fatal("the document holds null")
	}
	return 0
}

func mustSurvive(t testing.TB, d shadow.Document) {
	t.Helper()
	back, err := shadow.DecodeDocument(d.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, d) {
		t.Fatalf("decoded %s from %s", back.Encode(), d.Encode())
	}
}

func mustBeJSON(t testing.TB, body []byte) {
	t.Helper()
	if !json.Valid(body) {
		t.Fatalf("not JSON: %s", body)
	}
}
