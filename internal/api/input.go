package api

import (
	"crypto/sha256"
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// bodyMost is the largest body that is read, in bytes.
const bodyMost = 64 << 10

// opt is a field of a body. It tells an absent one from one that is null, which
// is refused: null is no string and no number.
type opt[T any] struct {
	Set bool
	V   T
}

var (
	errNull = errors.New("must not be null; leave the field out")
	errNUL  = errors.New("must not contain the character U+0000")
)

// UnmarshalJSONFrom implements json.UnmarshalerFrom.
func (o *opt[T]) UnmarshalJSONFrom(dec *jsontext.Decoder) error {
	if dec.PeekKind() == jsontext.KindNull {
		return errNull
	}
	if err := json.UnmarshalDecode(dec, &o.V); err != nil {
		return err
	}
	if s, ok := any(o.V).(string); ok && strings.ContainsRune(s, 0) {
		return errNUL
	}
	o.Set = true
	return nil
}

// body reads the request's body whole, once.
func (c *call) body() ([]byte, error) {
	b, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, bodyMost))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, fail(http.StatusRequestEntityTooLarge, "a body may have at most %d bytes", bodyMost)
	case err != nil:
		return nil, fail(http.StatusBadRequest, "the body could not be read: send all of it, and in time")
	}
	if len(b) > 0 {
		err = c.checkContentType()
	}
	h := sha256.New()
	h.Write([]byte(c.r.Method + " " + c.r.URL.Path + "\n"))
	h.Write(b)
	c.fingerprint = h.Sum(nil)
	return b, err
}

func (c *call) checkContentType() error {
	if c.r.Header.Get("Content-Encoding") != "" {
		return fail(http.StatusUnsupportedMediaType, "send the body without a Content-Encoding")
	}
	given := c.r.Header.Get("Content-Type")
	if given == "" {
		return nil
	}
	t, params, err := mime.ParseMediaType(given)
	charset := params["charset"]
	if err != nil || t != "application/json" || charset != "" && !strings.EqualFold(charset, "utf-8") {
		return fail(http.StatusUnsupportedMediaType, "send the body as Content-Type: application/json")
	}
	return nil
}

// decode reads a body strictly into a struct of opt fields: one JSON object,
// valid UTF-8, no name twice, every known field of its type. Unknown fields are
// ignored. An empty body leaves all fields absent.
func (c *call) decode(into any) error {
	b, err := c.body()
	if err != nil || len(b) == 0 {
		return err
	}
	if k := jsontext.Value(b).Kind(); k != jsontext.KindBeginObject {
		return fail(http.StatusBadRequest, "the body must be one JSON object")
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fail(http.StatusBadRequest, "%s", explain(err))
	}
	return nil
}

// explain says what is wrong with a body in its own terms, not in Go's.
func explain(err error) string {
	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) {
		if errors.Is(err, jsontext.ErrDuplicateName) {
			return "the body has the field " + string(syntax.JSONPointer) + " twice"
		}
		return "the body is not valid JSON in UTF-8: " + syntax.Err.Error()
	}
	var semantic *json.SemanticError
	if !errors.As(err, &semantic) {
		return "the body is not what it should be"
	}
	where := "field " + string(semantic.JSONPointer)
	switch {
	case errors.Is(err, errNull):
		return where + " " + errNull.Error()
	case errors.Is(err, errNUL):
		return where + " " + errNUL.Error()
	}
	return where + " has the wrong type or is out of range"
}

// text checks a string's length in bytes.
func text(name string, o opt[string], least, most int) error {
	switch {
	case least > 0 && !o.Set:
		return fail(http.StatusBadRequest, "the field %s is required", name)
	case o.Set && len(o.V) < least:
		return fail(http.StatusBadRequest, "%s must not be empty", name)
	case len(o.V) > most:
		return fail(http.StatusBadRequest, "%s may have at most %d bytes", name, most)
	}
	return nil
}

// characters checks a string's length in characters.
func characters(name string, o opt[string], most int) error {
	if utf8.RuneCountInString(o.V) > most {
		return fail(http.StatusBadRequest, "%s may have at most %d characters", name, most)
	}
	return nil
}

// number passes an optional integer on.
func number(o opt[int64]) *int64 {
	if !o.Set {
		return nil
	}
	return &o.V
}

// first answers with the first error there is.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
