package contracttest

import (
	"bytes"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/pb33f/jsonschema/v6"
	"github.com/pb33f/libopenapi"
	"github.com/pb33f/libopenapi-validator/responses"
	"github.com/pb33f/libopenapi-validator/router"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"

	"github.com/openlock/openlock/internal/contract"
)

// rules is the contract, compiled.
type rules struct {
	router    router.Router
	bodies    responses.ResponseBodyValidator
	events    map[string]*jsonschema.Schema // by event type
	errorBody *jsonschema.Schema
}

// loadRules compiles the contract once, because that takes far longer than most
// tests do.
var loadRules = sync.OnceValues(func() (*rules, error) {
	document, err := libopenapi.NewDocument(contract.OpenAPI)
	if err != nil {
		return nil, err
	}
	model, err := document.BuildV3Model()
	if err != nil {
		return nil, err
	}
	events, err := compileEvents(contract.Events)
	if err != nil {
		return nil, err
	}
	errorBody, err := compileErrorBody()
	if err != nil {
		return nil, err
	}
	return &rules{
		router:    router.NewRouter(&model.Model),
		bodies:    responses.NewResponseBodyValidator(&model.Model),
		events:    events,
		errorBody: errorBody,
	}, nil
})

// route returns the operation of the contract that req asks for, or nil when
// the contract has no such path or not with this method.
func (r *rules) route(req *http.Request) *router.Route {
	route, err := r.router.FindRoute(req)
	if err != nil {
		return nil
	}
	return route
}

// violations says how an answer breaks the contract. It returns none for a good
// answer.
func (r *rules) violations(req *http.Request, resp *http.Response, route *router.Route, body []byte) []string {
	if route == nil {
		return r.errorViolations(resp, body)
	}
	documented := route.Operation.Responses.Codes.GetOrZero(strconv.Itoa(resp.StatusCode)) != nil
	if !documented && resp.StatusCode < 400 {
		return []string{"the contract does not list this status"}
	}

	var wrong []string
	if documented {
		wrong = r.bodyViolations(req, resp, route, body)
	}
	switch {
	case resp.StatusCode < 400:
		wrong = append(wrong, r.eventViolations(route.Path, body)...)
	case isJSON(resp.Header) || !isPage(route.Operation):
		wrong = append(wrong, r.errorViolations(resp, body)...)
	}
	return wrong
}

// bodyViolations holds content type and body against what the contract
// documents for this status.
func (r *rules) bodyViolations(req *http.Request, resp *http.Response, route *router.Route, body []byte) []string {
	if value := bytes.TrimSpace(body); isJSON(resp.Header) && (len(value) == 0 || string(value) == "null") {
		return []string{"the body is empty or null"} // which the library takes for no answer to check
	}
	answer := *resp // the library reads the body that it is given
	answer.Body = io.NopCloser(bytes.NewReader(body))
	_, failures := r.bodies.ValidateResponseBodyWithPathItem(req, &answer, route.PathItem, route.Path)

	var wrong []string
	for _, failure := range failures {
		if len(failure.SchemaValidationErrors) == 0 {
			wrong = append(wrong, failure.Reason)
		}
		for _, detail := range failure.SchemaValidationErrors {
			wrong = append(wrong, "body"+strings.TrimPrefix(detail.FieldPath, "$")+": "+detail.Reason)
		}
	}
	return wrong
}

// isPage tells whether the operation shows a page to a person. Only those may
// answer an error with something other than the one error body.
func isPage(operation *v3.Operation) bool {
	for _, response := range operation.Responses.Codes.FromOldest() {
		if response.Content != nil && response.Content.GetOrZero("text/html") != nil {
			return true
		}
	}
	return false
}

func isJSON(h http.Header) bool {
	mediaType, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	return err == nil && mediaType == "application/json"
}
